"use strict";
const rows = [...document.querySelectorAll("article")];
const find = document.getElementById("find");
const order = document.getElementById("order");
function show() {
  const wanted = document.querySelector("input[name=show]:checked").value;
  const words = find.value.toLowerCase().split(/\s+/);
  for (const row of rows) {
    const fits = wanted === "all" || row.classList.contains(wanted);
    row.hidden = !(fits && words.every(word => row.dataset.find.includes(word)));
  }
  for (const section of document.querySelectorAll("section"))
    section.hidden = !section.querySelector("article:not([hidden])");
  document.getElementById("nothing").hidden = rows.length === 0 || rows.some(row => !row.hidden);
}
const orders = {
  probability: (a, b) => Number(b.dataset.probability) - Number(a.dataset.probability),
  study: (a, b) => a.dataset.name.localeCompare(b.dataset.name, undefined, {numeric: true}),
  patient: (a, b) => a.dataset.patient.localeCompare(b.dataset.patient, undefined, {numeric: true}),
  date: (a, b) => b.dataset.date.localeCompare(a.dataset.date),
};
order.addEventListener("input", () => {
  for (const section of document.querySelectorAll("section"))
    section.append(...[...section.querySelectorAll("article")].sort(orders[order.value]));
});
for (const input of document.querySelectorAll("#filters input")) input.addEventListener("input", show);
show();
