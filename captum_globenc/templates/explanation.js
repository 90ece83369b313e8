"use strict";
const { methods, shares } = JSON.parse(document.getElementById("data").textContent);
const [follow, method, layer, way, tokens, told] = [
  "follow", "method", "layer", "way", "tokens", "told",
].map((id) => document.getElementById(id));
const buttons = [...tokens.querySelectorAll("button")];
// Isolated, so that a right-to-left token leaves the sentence around it alone.
const names = buttons.map((b) => `“\u2068${b.firstElementChild.textContent}\u2069”`);
// A token stays followed after a click or with the focus, and while it is pointed at.
let pinned = null;
let pointed = null;
let current = 0; // the one that Tab stops at
let pinnedBefore = null; // when the pointer went down

// Shares are counted in hundredths of a percent.
const percent = (share) => `${(share / 100).toFixed(1)}\u00a0%`;
const short = (share) =>
  share < 50 ? "" : (share / 100).toFixed(share < 995 ? 1 : 0);
const list = (row, token) =>
  row
    .map((share, other) => [share, other])
    .filter(([share, other]) => other !== token && share >= 50)
    .sort(([a], [b]) => b - a)
    .slice(0, 3)
    .map(([share, other]) => `${names[other]} ${percent(share)}`)
    .join(", ") || "none has 0.5 %";

function draw() {
  const shown = methods[method.value];
  const matrices = shares[shown.local];
  const token = pointed ?? pinned;
  const goes = way.querySelector(":checked").value === "to";
  layer.disabled = way.disabled = !matrices;
  let strengths = shown.tokens.map((one) => one.strength);
  let numbers = shown.tokens.map((one) => one.number);
  let row = [];
  if (matrices && token !== null) {
    const matrix = matrices[layer.value];
    row = goes ? matrix.map((sources) => sources[token]) : matrix[token];
    const most = Math.max(...row) || 1;
    strengths = row.map((share) => Math.sqrt(share / most));
    numbers = row.map(short);
  }
  buttons.forEach((button, index) => {
    button.classList.toggle("negative", strengths[index] < 0);
    button.classList.toggle("positive", strengths[index] >= 0);
    button.classList.toggle("active", index === token);
    button.style.setProperty("--strength", Math.abs(strengths[index]).toFixed(3));
    button.lastElementChild.textContent = numbers[index];
    button.setAttribute("aria-pressed", index === pinned);
    button.tabIndex = index === current ? 0 : -1;
  });
  told.textContent = sentence(shown, matrices, token, goes, row);
}

function sentence(shown, matrices, token, goes, row) {
  if (token === null) {
    return "Point at a token, tap it, or move to it with Tab and the arrow keys. " +
      "Escape lets go of it.";
  }
  if (!matrices) {
    const { score } = shown.tokens[token];
    return `${names[token]}: score ${Number(score.toPrecision(4))}. ` +
      "The layers of this method are not known.";
  }
  const all = matrices.length - 1;
  // The scores are the rollout's row of what the classifier reads.
  const whole = shown.tokens.reduce((sum, one) => sum + one.score, 0) || 1;
  const part = 1e4 * shown.tokens[token].score / whole;
  const where = Number(layer.value) === all
    ? "Through all layers" : `In layer ${Number(layer.value) + 1}`;
  const own = percent(row[token]);
  const others = list(row, token);
  return `${names[token]}: ${percent(part)} of the evidence that reaches the ` +
    "classifier through all layers. " + (goes
    ? `${where}, ${own} of what it takes is its own; of what others take, it is most ` +
      `in: ${others}.`
    : `${where}, it takes ${own} from itself; from others, most from: ${others}.`);
}

const indexOf = (event) => buttons.indexOf(event.target.closest("button"));

function move(to) {
  if (to >= 0 && to < buttons.length) buttons[to].focus();
}

// The nearest token of the line above (-1) or below (1).
function vertical(from, step) {
  const centre = (index) => {
    const box = buttons[index].getBoundingClientRect();
    return [box.left + box.width / 2, Math.round(box.top)];
  };
  const [x, y] = centre(from);
  const places = buttons.map((_, index) => [...centre(index), index])
    .filter(([, top]) => (top - y) * step > 0);
  const line = step * Math.min(...places.map(([, top]) => top * step));
  const [nearest] = places.filter(([, top]) => top === line)
    .sort(([a], [b]) => Math.abs(a - x) - Math.abs(b - x));
  return nearest ? nearest[2] : from;
}

tokens.addEventListener("keydown", (event) => {
  const from = indexOf(event);
  const [forward, back] = tokens.dir === "rtl"
    ? ["ArrowLeft", "ArrowRight"] : ["ArrowRight", "ArrowLeft"];
  const to = {
    [forward]: () => from + 1,
    [back]: () => from - 1,
    ArrowDown: () => vertical(from, 1),
    ArrowUp: () => vertical(from, -1),
    Home: () => 0,
    End: () => buttons.length - 1,
  }[event.key];
  if (from < 0 || !to || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  move(to());
});
tokens.addEventListener("focusin", (event) => {
  [pinned, pointed] = [indexOf(event), null];
  current = pinned;
  draw();
});
tokens.addEventListener("pointerdown", () => { pinnedBefore = pinned; });
tokens.addEventListener("click", (event) => {
  const index = indexOf(event);
  if (index < 0) return;
  // A key (detail 0) or a second click lets go.
  const before = event.detail === 0 ? pinned : pinnedBefore;
  [pinned, pointed, current] = [before === index ? null : index, null, index];
  draw();
});
tokens.addEventListener("pointerover", (event) => {
  if (event.pointerType === "touch") return;
  const index = indexOf(event);
  pointed = index < 0 ? null : index;
  draw();
});
tokens.addEventListener("pointerleave", () => {
  pointed = null;
  draw();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  pinned = pointed = null;
  draw();
});
for (const control of [method, layer, way]) control.addEventListener("change", draw);
follow.hidden = false;
draw();
