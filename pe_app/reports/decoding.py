"""A report's text as databases and interfaces hand it out, made plain once, before anything is read.

HTML, RTF, the escapes of HL7 version 2, Unicode's many blanks and line ends, tables and tick boxes become lines of
plain text as a radiologist would read them.
"""

from __future__ import annotations

import html
import re
import unicodedata
from itertools import pairwise

ANSWER = (
    r"(?:none|no|nil|negative|absent|not (?:seen|present|identified|detected|demonstrated)|yes|positive|present|y|n)"
)
"""What a template's field is answered with."""

_LONGEST_LINE = 4000
"""Characters; what is longer is no line of a table, and is left as it is so that no text can take for ever."""


def plain_text(text: str) -> str:
    """Lines of plain text, separated by newlines, without boxes that are not ticked."""
    text = _without_rtf(text) if text.lstrip().startswith("{\\rtf") else text
    text = _without_hl7(text)
    text = _without_html(_without_entities(text))
    text = _with_common_characters(text)
    both = "\u25cb" in text and "\u25cf" in text  # a filled circle is a tick only where there are empty ones, too
    text = text.translate(_TICKS | (_CIRCLES if both else {}))
    lines = (_ticked(_cells(line)) if len(line) <= _LONGEST_LINE else line for line in text.split("\n"))
    return "\n".join(line for line in lines if line is not None)


# --- RTF --------------------------------------------------------------------------------------------------------------

_RTF_TOKEN = re.compile(
    r"\\u(?P<code>-?\d+) ?\??|\\'(?P<byte>[0-9a-fA-F]{2})|\\(?P<word>[a-zA-Z]+)(?:-?\d+)? ?|\\(?P<sign>[^a-zA-Z])"
    r"|(?P<open>\{)|(?P<close>\})|(?P<text>[^\\{}\r\n]+)"
)
_RTF_WORDS = {"par": "\n", "line": "\n", "sect": "\n", "page": "\n", "row": "\n", "tab": "\t", "cell": "\t"}
_RTF_HIDDEN = frozenset(
    ("fonttbl", "colortbl", "stylesheet", "info", "header", "footer", "pict", "generator", "listtable", "themedata",
     "listoverridetable", "rsidtbl", "xmlnstbl", "latentstyles", "datastore", "fldinst", "object")
)  # fmt: skip
"""Groups that hold no text."""


def _without_rtf(text: str) -> str:
    parts: list[str] = []
    hidden = [False]
    for token in _RTF_TOKEN.finditer(text):
        kind, value = token.lastgroup, token[str(token.lastgroup)]
        if kind == "open":
            hidden.append(hidden[-1])
        elif kind == "close":
            if len(hidden) > 1:
                hidden.pop()
        elif value == "*" or value in _RTF_HIDDEN:
            hidden[-1] = True
        elif not hidden[-1]:
            parts.append(_rtf_text(str(kind), value))
    return "".join(parts)


def _rtf_text(kind: str, value: str) -> str:
    if kind == "code":
        return chr(int(value) % 0x10000)
    if kind == "byte":
        return bytes.fromhex(value).decode("cp1252", "replace")
    if kind == "word":
        return _RTF_WORDS.get(value, "")
    if kind == "sign":
        return {"~": " ", "_": "-", "-": "", "\n": "\n", "\r": "\n"}.get(value, value)
    return value


# --- HL7, entities and HTML ------------------------------------------------------------------------------------------

_HL7_COMMAND = re.compile(r"\\\.(?:br|sp|sk|ce|in|ti|fi|nf)\s?[+-]?\d*\\")
_HL7_SIGN = re.compile(r"\\([FSTRHNE])\\")
_HL7_SIGNS = {"F": "|", "S": "^", "T": "&", "R": "~", "H": "", "N": "", "E": "\\"}
_HL7_BYTES = re.compile(r"\\X((?:[0-9A-Fa-f]{2})+)\\")
_REPEATED = re.compile(r"~(?=\s*\d+[.)]\s)|(?<=\w[.:;!?])~|(?<!^)(?<!\s)~(?=\s*[A-Za-z\[(*-])|~(?=\s*(?:~|$|\n))")
"""A tilde between repetitions of an HL7 field, and not one that means about."""
_ESCAPED_LINE = re.compile(r"\\r\\n|\\n|_x000[dD]_")


def _without_hl7(text: str) -> str:
    text = _HL7_COMMAND.sub("\n", text)
    text = _HL7_BYTES.sub(lambda match: bytes.fromhex(match[1]).decode("latin-1"), text)
    text = _REPEATED.sub("\n", text)
    text = _ESCAPED_LINE.sub("\n", text)
    return _HL7_SIGN.sub(lambda match: _HL7_SIGNS[match[1]], text)


_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z]{2,31}\d{0,2});|&nbsp\b")


def _without_entities(text: str) -> str:
    for _ in range(3):  # some exports escape what is escaped
        text, found = _ENTITY.subn(lambda match: html.unescape(match[0]), text)
        if not found:
            break
    return text


_HIDDEN_ELEMENT = re.compile(
    r"<(style|script|head|title)\b[^<>]*>.*?</\1\s*>|<!--.*?-->|<\?xml[^<>]*>|<!DOCTYPE[^<>]*>",
    re.IGNORECASE | re.DOTALL,
)
_CELL_TAG = re.compile(r"</t[dh]\s*>\s*<t[dh]\b[^<>]*>", re.IGNORECASE)
_BLOCK_TAG = re.compile(
    r"</?(?:p|br|div|tr|table|thead|tbody|tfoot|caption|ul|ol|li|dl|dt|dd|h[1-6]|hr|pre|section|article|blockquote|body"
    r"|html|paragraph|list|item|text|title)\b[^<>]*>",
    re.IGNORECASE,
)
_INLINE_TAG = re.compile(
    r"</?(?:[a-z]+:[a-z]+|a|abbr|b|big|center|cite|code|col|colgroup|content|em|font|i|img|input|ins|label|mark|meta|o|q"
    r"|s|small|span|strike|strong|sub|sup|td|th|tt|u)\b[^<>]*>",
    re.IGNORECASE,
)
_CHECKBOX = re.compile(r"<input\b[^<>]*\b(?:checkbox|radio)\b[^<>]*>", re.IGNORECASE)


def _without_html(text: str) -> str:
    if "<" not in text:
        return text
    if _BLOCK_TAG.search(text) and re.search(r"<(?:br|p|div|tr|li)\b", text, re.IGNORECASE):
        text = re.sub(r"\s*\n\s*", " ", text) if not re.search(r"<pre\b", text, re.IGNORECASE) else text
    text = _HIDDEN_ELEMENT.sub("", text)
    text = _CHECKBOX.sub(lambda tag: "[x] " if re.search(r"\bchecked\b", tag[0], re.IGNORECASE) else "[ ] ", text)
    text = _CELL_TAG.sub("\t", text)
    text = _BLOCK_TAG.sub("\n", text)
    return _INLINE_TAG.sub("", text)


# --- characters -------------------------------------------------------------------------------------------------------

_LINE_ENDS = re.compile("\r\n|[\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\x00-\x08\x0e-\x1b\x1f\x7f]")
_DASHES_AND_QUOTES = str.maketrans(
    {**dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"), "\u2019": "'", "\u2018": "'", "\u201c": '"',
     "\u201d": '"', "\u00b4": "'", "`": "'"}
)  # fmt: skip
_EMPTY, _FILLED = "\u2610\u25a1\u25fb\u2b1c\u25a2", "\u2611\u2612\u2713\u2714\u25a0\u2705"
_TICKS = str.maketrans({**dict.fromkeys(_EMPTY, "[ ]"), **dict.fromkeys(_FILLED, "[x]")})
_CIRCLES = str.maketrans({"\u25cb": "[ ]", "\u25cf": "[x]"})


def _with_common_characters(text: str) -> str:
    """One kind of line end, blank, dash and quotation mark; ligatures as their letters."""
    text = _LINE_ENDS.sub("\n", text)
    text = unicodedata.normalize("NFKC", text)
    return _INVISIBLE.sub("", text).translate(_DASHES_AND_QUOTES)


# --- tables and tick boxes -------------------------------------------------------------------------------------------

_BORDER = re.compile(r"[\s|+=_-]*")
_LEADERS = re.compile(rf"(?<=\w)\s*(?:\.{{3,}}|_{{3,}}| {{3,}}|-{{3,}})\s*(?={ANSWER}\W*$)", re.IGNORECASE)
_ITEM_MARK = re.compile(r"[-*•>#]+|\(?\w{1,2}[.)]")
_ANSWERED = re.compile(rf"{ANSWER}\W*", re.IGNORECASE)
_CHOICE = re.compile(r"[(\[]?\b(?:yes ?/ ?no|y ?/ ?n|positive ?/ ?negative)\b[)\]]?(?: ?[:=])?", re.IGNORECASE)


def _cells(line: str) -> str:
    """A table's row as ``name: value``; what is no row stays as it is."""
    line = _CHOICE.sub("", line)
    if "|" in line:
        line = "" if _BORDER.fullmatch(line) else line.strip().strip("|").replace("|", "\t")
    line = _LEADERS.sub("\t", line)
    cells = [cell for part in line.split("\t") if (cell := " ".join(part.split()))]
    if len(cells) < 2:
        return line.replace("\t", " ")
    text = cells[0]
    for before, cell in pairwise(cells):
        if before[-1] in ":?.;" or _ITEM_MARK.fullmatch(before):
            text += f" {cell}"
        elif len(cells) == 2 or _ANSWERED.fullmatch(cell):
            text += f": {cell}"
        else:
            text += f"; {cell}"
    return text


_BOX = re.compile(r"\[(?P<box>[ _]*|[xX*+])\]|\((?P<bracket>[ _]*|[xX])\)")
_BEFORE_BOX = re.compile(rf"(?:.*[:?;,]|(?:.*\W)?{ANSWER}|[-*•>#\s]*|\(?\w{{1,2}}[.)])\s*", re.IGNORECASE)
_LAST_OPTION = re.compile(rf"(?:^|(?<=[:?;,]))[^:?;,]*$|\b{ANSWER}\W*$", re.IGNORECASE)


def _ticked(line: str) -> str | None:
    """A line of tick boxes with what is ticked alone; None where nothing is. Other lines stay as they are."""
    boxes = list(_BOX.finditer(line))
    if not boxes:
        return line
    trailing = not line[boxes[-1].end() :].strip(" .;,")
    if not trailing and not _BEFORE_BOX.fullmatch(line[: boxes[0].start()]):
        return line  # a blank that was to be filled in, within a sentence
    return _with_boxes_after(line, boxes) if trailing else _with_boxes_before(line, boxes)


def _is_ticked(box: re.Match[str]) -> bool:
    return bool((box["box"] or box["bracket"] or "").strip(" _"))


def _with_boxes_before(line: str, boxes: list[re.Match[str]]) -> str | None:
    """``[ ] Yes [x] No``: a box belongs to what follows it."""
    stem = line[: boxes[0].start()].strip()
    ends = [*(box.start() for box in boxes[1:]), len(line)]
    ticked = [line[b.end() : end].strip(" ,;/") for b, end in zip(boxes, ends, strict=True) if _is_ticked(b)]
    if not ticked:
        return None
    return " ".join([*([stem] if stem else []), ", ".join(ticked)])


def _with_boxes_after(line: str, boxes: list[re.Match[str]]) -> str | None:
    """``Yes [ ] No [x]``: a box belongs to what precedes it."""
    starts = [0, *(box.end() for box in boxes[:-1])]
    options = [line[start : box.start()].strip(" ,;/") for start, box in zip(starts, boxes, strict=True)]
    first = _LAST_OPTION.search(options[0])
    stem = options[0][: first.start()].strip(" :") if first else options[0]
    options[0] = options[0][first.start() :].strip() if first else ""
    ticked = [option for option, box in zip(options, boxes, strict=True) if _is_ticked(box)]
    if not ticked:
        return None
    answer = ", ".join(ticked)
    if stem:
        return f"{stem}: {answer}"
    return answer if len(boxes) > 1 else f"{answer}: yes"
