// Draws the curves of comparison_page.py: each .panels of a section is filled with one
// figure a panel, again whenever a run is shown or hidden, the axis is changed or the
// window is resized.
"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const SECTIONS = [...document.querySelectorAll("section")];
const MARGIN = { left: 52, right: 10, top: 8, bottom: 34 };
const HEIGHT = 230;

function svg(name, attributes, parent, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return parent.appendChild(node);
}

function format(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return +(value / 1e9).toPrecision(4) + "G";
  if (size >= 1e6) return +(value / 1e6).toPrecision(4) + "M";
  if (size >= 1e4) return +(value / 1e3).toPrecision(4) + "k";
  if (size > 0 && size < 1e-3) return (+value.toPrecision(4)).toExponential();
  return String(+value.toPrecision(4));
}

// Round numbers between low and high, about `count` of them.
function ticks(low, high, count, logarithmic) {
  if (logarithmic) {
    const all = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const digit of [1, 2, 5]) all.push(digit * 10 ** power);
    const inside = all.filter((value) => value >= low && value <= high);
    const tens = inside.filter((value) => Math.abs(Math.log10(value) % 1) < 1e-9);
    if (inside.length >= 2) return inside.length > 8 && tens.length > 1 ? tens : inside;
  }
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * step; n++) found.push(n * step);
  return found;
}

// Where a value is between two ends in pixels; equal values stand in the middle.
// `padding`: this share of the range is left free at both ends.
function scale(values, start, end, logarithmic, padding) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low === high) {
    const half = logarithmic ? low / 2 : Math.abs(low) / 20 || 1;
    [low, high] = [low - half, high + half];
  }
  const by = logarithmic ? Math.log : (value) => value;
  if (padding && !logarithmic) {
    const free = padding * (high - low);
    [low, high] = [low - (low < 0 || low >= free ? free : low), high + free]; // not below 0 for its sake
  }
  const place = (value) => start + ((by(value) - by(low)) / (by(high) - by(low))) * (end - start);
  return { low, high, place };
}

function draw(figure, panel, section, shown, axis, logarithmic) {
  const [caption, note] = [document.createElement("figcaption"), document.createElement("span")];
  figure.replaceChildren(caption);
  caption.append(panel.title, document.createElement("br"), note);
  const width = figure.clientWidth || 400;
  const picture = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": panel.title }, figure);

  const lines = panel.lines.filter((line) => shown[line.row]);
  const placed = lines.filter((line) => line[axis]);
  const missing = new Set(lines.filter((line) => !line[axis]).map((line) => line.row)).size;
  const usable = (y) => y !== null && (!logarithmic || y > 0);
  const points = [];
  for (const line of placed)
    line.y.forEach((y, i) => { if (usable(y) && line[axis][i] !== null) points.push({ line, i, y, x: line[axis][i] }); });
  const said = [];
  if (missing) said.push(`${missing} not shown: their files do not tell ${axis}`);
  const broken = new Set(placed.filter((line) => line.y.includes(null)).map((line) => line.row)).size;
  if (broken) said.push(`${broken} with values that are not finite`);
  note.textContent = said.join("; ");
  if (!points.length) return;

  const x = scale(points.map((point) => point.x), MARGIN.left, width - MARGIN.right, false, 0);
  const y = scale(points.map((point) => point.y), HEIGHT - MARGIN.bottom, MARGIN.top, logarithmic, 0.04);
  for (const value of ticks(y.low, y.high, 5, logarithmic)) {
    svg("path", { class: "axis", d: `M${MARGIN.left} ${y.place(value)}H${width - MARGIN.right}` }, picture);
    svg("text", { x: MARGIN.left - 6, y: y.place(value) + 4, "text-anchor": "end" }, picture, format(value));
  }
  for (const value of ticks(x.low, x.high, Math.max(2, width / 80), false).filter((v) => axis === "epochs" || v % 1 === 0))
    svg("text", { x: x.place(value), y: HEIGHT - 19, "text-anchor": "middle" }, picture, format(value));
  svg("text", { x: (MARGIN.left + width) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, picture, axis);

  const paths = new Map();
  for (const line of placed) {
    const [color, dash] = section.styles[line.row];
    const group = svg("g", { style: `stroke:${color};fill:${color}` }, picture);
    let path = "";
    line.y.forEach((value, i) => {
      const at = (k) => usable(line.y[k] ?? null) && line[axis][k] !== null;
      if (!at(i)) return;
      const [left, top] = [x.place(line[axis][i]), y.place(value)];
      path += `${at(i - 1) ? "L" : "M"}${left.toFixed(1)} ${top.toFixed(1)}`;
      if (!at(i - 1) && !at(i + 1)) svg("circle", { cx: left, cy: top, r: 3.5, stroke: "none" }, group);
    });
    svg("path", { class: "line", d: path || "M0 0", "stroke-dasharray": dash }, group);
    paths.set(line, group);
  }

  const dot = svg("circle", { r: 4, fill: "none", stroke: "CanvasText", visibility: "hidden" }, picture);
  picture.addEventListener("mousemove", (event) => {
    const box = picture.getBoundingClientRect();
    const [left, top] = [event.clientX - box.left, event.clientY - box.top];
    let best = null, nearest = Infinity;
    for (const point of points) {
      const distance = (x.place(point.x) - left) ** 2 + (y.place(point.y) - top) ** 2;
      if (distance < nearest) [best, nearest] = [point, distance];
    }
    note.textContent = `${section.names[best.line.row]}: ${format(best.y)} at ${format(best.x)} ${axis}`;
    dot.setAttribute("cx", x.place(best.x));
    dot.setAttribute("cy", y.place(best.y));
    dot.setAttribute("visibility", "visible");
    for (const [line, group] of paths) group.classList.toggle("faded", line !== best.line);
    mark(figure.closest("section"), best.line.row);
  });
  picture.addEventListener("mouseleave", () => {
    note.textContent = said.join("; ");
    dot.setAttribute("visibility", "hidden");
    for (const group of paths.values()) group.classList.remove("faded");
    mark(figure.closest("section"), null);
  });
}

// The row of the table whose curve the pointer is near.
function mark(section, row) {
  section.querySelectorAll("tbody tr").forEach((line, number) => line.classList.toggle("near", number === row));
}

function redraw(section) {
  const element = SECTIONS[DATA.indexOf(section)];
  const shown = [...element.querySelectorAll("tbody input")].map((box) => box.checked);
  const axis = document.querySelector("input[name=axis]:checked").value;
  const logarithmic = document.getElementById("log").checked;
  element.querySelectorAll(".panels").forEach((grid, number) => {
    const panels = section.grids[number];
    while (grid.children.length < panels.length) grid.append(document.createElement("figure"));
    if (grid.offsetParent === null) return; // folded: drawn when it unfolds
    panels.forEach((panel, i) => draw(grid.children[i], panel, section, shown, axis, logarithmic));
  });
}

const redrawAll = () => DATA.forEach(redraw);
SECTIONS.forEach((element, number) => {
  const boxes = [...element.querySelectorAll("tbody input")];
  const all = element.querySelector("thead input");
  element.addEventListener("change", (event) => {
    if (event.target === all) for (const box of boxes) box.checked = all.checked;
    const checked = boxes.filter((box) => box.checked).length;
    all.checked = checked > 0;
    all.indeterminate = checked > 0 && checked < boxes.length;
    redraw(DATA[number]);
  });
  element.querySelector("details")?.addEventListener("toggle", () => redraw(DATA[number]));
});
document.querySelector(".controls").addEventListener("change", redrawAll);
addEventListener("resize", redrawAll);
redrawAll();
