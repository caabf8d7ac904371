"use strict";
const stack = JSON.parse(document.getElementById("stack").textContent);
const count = stack.pictures.length;
const windows = Object.fromEntries(stack.windows.map(([name, low, high]) => [name, [low, high]]));
const names = Object.keys(windows);
const ct = document.getElementById("ct").getContext("2d", {willReadFrequently: true});
const tint = document.getElementById("tint").getContext("2d");
const screen_ = document.getElementById("screen");
const slider = document.getElementById("slider");
const attentionButton = document.getElementById("attention");
const images = stack.pictures.map(content => {
  const image = new Image();
  image.src = "data:image/jpeg;base64," + content;
  return image;
});
const cells = stack.attention && Uint8Array.from(atob(stack.attention.cells), letter => letter.charCodeAt(0));
let shown = 0, windowName = names[0], attention = false;

// HU of every gray of the JPEGs, by straight lines between the knots
const hu = new Float32Array(256);
for (let k = 0; k + 1 < stack.grays.length; k++) {
  const [[g0, h0], [g1, h1]] = [stack.grays[k], stack.grays[k + 1]];
  for (let g = g0; g <= g1; g++) hu[g] = h0 + (h1 - h0) * (g - g0) / (g1 - g0);
}

function colour(strength) {
  const place = strength * (stack.colours.length - 1), k = Math.min(Math.floor(place), stack.colours.length - 2);
  return stack.colours[k].map((low, band) => low + (stack.colours[k + 1][band] - low) * (place - k));
}

function drawTint() {
  tint.clearRect(0, 0, stack.width, stack.height);
  if (!attention || !cells) return;
  const {rows, columns, box} = stack.attention, small = new OffscreenCanvas(columns, rows);
  const brush = small.getContext("2d"), pixels = brush.createImageData(columns, rows);
  for (let k = 0; k < rows * columns; k++) {
    const strength = cells[shown * rows * columns + k] / 255;
    pixels.data.set([...colour(strength), 255 * Math.min(Math.max(1.2 * strength - 0.1, 0), 0.6)], 4 * k);
  }
  brush.putImageData(pixels, 0, 0);
  tint.imageSmoothingQuality = "high";
  tint.drawImage(small, box[0] * stack.width, box[1] * stack.height, box[2] * stack.width, box[3] * stack.height);
}

async function draw() {
  const wanted = shown, image = images[wanted];
  await image.decode();
  if (wanted !== shown) return;
  ct.drawImage(image, 0, 0);
  const pixels = ct.getImageData(0, 0, stack.width, stack.height), [low, high] = windows[windowName];
  for (let k = 0; k < pixels.data.length; k += 4) {
    const gray = 255 * (hu[pixels.data[k]] - low) / (high - low);
    pixels.data[k] = pixels.data[k + 1] = pixels.data[k + 2] = gray;
  }
  ct.putImageData(pixels, 0, 0);
  drawTint();
  const probability = stack.probability[shown];
  document.getElementById("where").textContent = stack.names[shown] + "\nz " + stack.z_mm[shown] + " mm"
    + (probability === undefined ? "" : "\nslab probability " + probability.toFixed(2));
  document.getElementById("window").textContent = windowName + "  W " + (high - low) + " L " + (high + low) / 2;
  screen_.dataset.slice = stack.slices[shown];
  screen_.dataset.window = windowName;
  screen_.dataset.attention = attention;
  const here = document.getElementById("here");
  if (here) for (const end of ["x1", "x2"]) here.setAttribute(end, 300 * shown / Math.max(count - 1, 1));
}

function show(index) {
  shown = Math.min(Math.max(Math.round(index), 0), count - 1);
  slider.value = shown;
  draw();
}

function showSlice(slice) {
  const distances = stack.slices.map(other => Math.abs(other - slice));
  show(distances.indexOf(Math.min(...distances)));
}

function setWindow(name) {
  windowName = name;
  for (const button of document.querySelectorAll("[data-window]"))
    button.setAttribute("aria-pressed", button.dataset.window === name);
  draw();
}

function toggleAttention() {
  if (!cells) return;
  attention = !attention;
  attentionButton.setAttribute("aria-pressed", attention);
  draw();
}

function scaleBar() {
  document.getElementById("bar").style.width = 50 / stack.mm_per_pixel * screen_.clientWidth / stack.width + "px";
}

slider.addEventListener("input", () => show(Number(slider.value)));
let turned = 0;
screen_.addEventListener("wheel", event => {
  event.preventDefault();
  turned += event.deltaY;
  if (Math.abs(turned) >= 30) { show(shown - Math.sign(turned)); turned = 0; }
}, {passive: false});
let touched = null;
screen_.addEventListener("touchstart", event => { touched = [event.touches[0].clientY, shown]; }, {passive: true});
screen_.addEventListener("touchmove", event => {
  event.preventDefault();
  show(touched[1] + (touched[0] - event.touches[0].clientY) / 8);
}, {passive: false});
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const steps = {ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 5, PageDown: -5};
  const wanted = document.activeElement === screen_ || event.key === "ArrowLeft" || event.key === "ArrowRight";
  if (event.key in steps && wanted && event.target !== slider) {
    event.preventDefault();
    show(shown + steps[event.key]);
  }
  if (names[Number(event.key) - 1]) setWindow(names[Number(event.key) - 1]);
  if (event.key === "a" || event.key === "A") toggleAttention();
});
for (const button of document.querySelectorAll("[data-window]"))
  button.addEventListener("click", () => setWindow(button.dataset.window));
if (attentionButton) attentionButton.addEventListener("click", toggleAttention);
const curve = document.getElementById("curve");
if (curve) curve.firstElementChild.addEventListener("click", event => {
  const place = curve.firstElementChild.getBoundingClientRect();
  show(((event.clientX - place.left) / place.width * 308 - 4) / 300 * (count - 1));
});
for (const target of document.querySelectorAll("[data-slice]:not(#screen)"))
  target.addEventListener("click", () => {
    showSlice(Number(target.dataset.slice));
    document.getElementById("viewer").scrollIntoView({block: "start"});
    screen_.focus({preventScroll: true});
  });
addEventListener("resize", scaleBar);
scaleBar();
setWindow(windowName);
const first = document.querySelector(".keys [data-slice]");
if (first) showSlice(Number(first.dataset.slice)); else show(count / 2);
