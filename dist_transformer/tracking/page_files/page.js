"use strict";
// Draws the report's charts as SVG from the data in the page. No library, no network; again when the width changes.
const DATA = JSON.parse(document.getElementById("data").textContent);
const DASHES = ["", "6 3", "2 3", "8 3 2 3", "12 3"];
let axis = "step";

function make(name, attributes, parent, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}
function html(name, attributes, parent, text) {
  const node = document.createElement(name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}
function short(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  for (const [limit, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= limit) return trim((value / (unit === "k" ? 1e3 : limit)).toPrecision(3)) + unit;
  }
  if (size < 1e-3) return value.toExponential(1).replace(".0e", "e");
  return trim(value.toPrecision(4));
}
function trim(text) { return text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text; }
function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-6; i++) found.push(i * step);
  return found;
}
function decades(low, high) {
  const found = [];
  for (let e = Math.ceil(Math.log10(low) - 1e-9); 10 ** e <= high * 1.0001; e++) found.push(10 ** e);
  return found.length > 1 ? found : [low, high];
}

// Steps to the chosen axis: tokens seen, or hours of wall time.
function place(run, step) {
  if (axis === "step") return step;
  const x = run.axis.step, y = run.axis[axis];
  if (!x.length) return step;
  let low = 0, high = x.length - 1;
  while (high - low > 1) { const mid = (low + high) >> 1; if (x[mid] <= step) low = mid; else high = mid; }
  if (x[high] === x[low]) return y[low];
  return y[low] + (y[high] - y[low]) * (step - x[low]) / (x[high] - x[low]);
}
// A running median against spikes, then a running mean; both look equally far to either side, and back at the end.
function smooth(values) {
  const reach = Math.max(2, Math.round(values.length / 100));
  const window = (i) => {
    const ahead = Math.min(reach, i, values.length - 1 - i), back = Math.min(reach, i, Math.max(ahead, reach >> 1));
    return [i - back, i + ahead + 1];
  };
  const calm = values.map((_, i) => { const w = values.slice(...window(i)).sort((a, b) => a - b); return w[w.length >> 1]; });
  return calm.map((_, i) => { const w = calm.slice(...window(i)); return w.reduce((a, b) => a + b, 0) / w.length; });
}
function seriesOf(spec) {
  const found = [];
  DATA.runs.forEach((run, r) => spec.lines.forEach((line, l) => {
    const points = run.series[line.key];
    if (!points || !points.length) return;
    const alone = DATA.runs.length === 1;
    found.push({ run, color: `var(--c${(alone ? l : r) % 7})`, dash: alone ? "" : DASHES[l % DASHES.length], dots: line.dots,
      name: alone ? line.name : spec.lines.length > 1 ? `${run.name}: ${line.name}` : run.name,
      x: points.map((p) => place(run, p[0])), y: points.map((p) => p[1]) });
  }));
  return found;
}
function range(values, clip) {
  const sorted = values.slice().sort((a, b) => a - b), n = sorted.length;
  let high = sorted[n - 1];
  const most = sorted[Math.floor(clip * (n - 1))];
  // Single spikes must not squeeze the curve.
  if (clip && n > 30 && high - most > 0.5 * (most - sorted[0])) high = most;
  return [sorted[0], high];
}

function draw(figure, spec) {
  figure.replaceChildren();
  const all = seriesOf(spec);
  if (!all.length) { figure.remove(); return; }
  html("h3", {}, figure, spec.title + (spec.unit ? ` (${spec.unit})` : ""));
  const legend = html("div", { class: "legend" }, figure);
  if (all.length > 1 || spec.lines.length > 1) for (const s of all) {
    const item = html("span", {}, legend);
    html("i", { style: `border-color:${s.color};border-top-style:${s.dash ? "dashed" : "solid"}` }, item);
    item.append(s.name);
  }
  const width = Math.max(220, figure.clientWidth - 22), height = spec.big ? Math.min(420, 160 + width * 0.25) : 190;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": spec.title }, figure);
  const box = { left: 50, right: width - 12, top: 8, bottom: height - 24 };
  // One range for all charts, so that they can be compared.
  const xs = all.flatMap((s) => s.x).concat(DATA.runs.flatMap((run) => run.axis[axis])), ys = all.flatMap((s) => s.y);
  let [x0, x1] = [Math.min(...ends(xs)), Math.max(...ends(xs))], [y0, y1] = range(ys, spec.clip);
  if (x1 === x0) { x0 -= 0.5; x1 += 0.5; }
  const log = spec.log && y0 > 0 && y1 > 30 * y0;
  if (spec.zero && y0 > 0 && !log) y0 = 0;
  if (y1 === y0) { const m = Math.abs(y0) * 0.1 || 1; y0 -= spec.zero && y0 === 0 ? 0 : m; y1 += m; }
  if (!log) { const margin = 0.05 * (y1 - y0); y1 += margin; if (y0 !== 0) y0 -= margin; }
  const scale = (v) => (log ? Math.log10(Math.max(v, y0 / 10)) : v), s0 = scale(y0), s1 = scale(y1);
  const px = (x) => box.left + (x - x0) / (x1 - x0) * (box.right - box.left);
  const py = (y) => box.bottom - (scale(y) - s0) / (s1 - s0) * (box.bottom - box.top);
  for (const t of log ? decades(y0, y1) : ticks(y0, y1, height / 48)) {
    make("line", { class: "grid", x1: box.left, x2: box.right, y1: py(t), y2: py(t) }, svg);
    make("text", { x: box.left - 6, y: py(t) + 4, "text-anchor": "end" }, svg, short(t));
  }
  for (const t of ticks(x0, x1, Math.min(8, width / 90))) {
    make("line", { class: "axis", x1: px(t), x2: px(t), y1: box.bottom, y2: box.bottom + 4 }, svg);
    const anchor = px(t) > box.right - 18 ? "end" : "middle";
    make("text", { x: px(t), y: box.bottom + 17, "text-anchor": anchor }, svg, short(t));
  }
  make("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }, svg);
  if (DATA.runs.length === 1) for (const mark of DATA.runs[0].restarts) {
    const x = px(place(DATA.runs[0], mark.step));
    if (x >= box.left && x <= box.right) make("title", {}, make("line", { class: "mark", x1: x, x2: x, y1: box.top, y2: box.bottom }, svg), mark.text);
  }
  const clip = `clip${Math.random().toString(36).slice(2)}`;
  make("rect", { x: box.left, y: box.top - 4, width: box.right - box.left + 4, height: box.bottom - box.top + 4 },
    make("clipPath", { id: clip }, make("defs", {}, svg)));
  const layer = make("g", { "clip-path": `url(#${clip})` }, svg);
  const path = (s, y) => y.map((v, i) => `${i ? "L" : "M"}${px(s.x[i]).toFixed(1)} ${py(v).toFixed(1)}`).join("");
  for (const s of all) {
    const noisy = s.y.length >= 40 && !s.dots && !spec.exact;
    if (noisy) make("path", { class: "raw", d: path(s, s.y), stroke: s.color }, layer);
    make("path", { class: "line", d: path(s, noisy ? smooth(s.y) : s.y), stroke: s.color, "stroke-dasharray": s.dash }, layer);
    if (s.dots || s.y.length < 3) s.y.forEach((v, i) => make("circle", { cx: px(s.x[i]), cy: py(v), r: 3, fill: s.color }, layer));
  }
  hover(figure, svg, all, px, box, width);
}
function ends(values) { let low = Infinity, high = -Infinity; for (const v of values) { if (v < low) low = v; if (v > high) high = v; } return [low, high]; }

function hover(figure, svg, all, px, box, width) {
  const line = make("line", { class: "mark", y1: box.top, y2: box.bottom, visibility: "hidden" }, svg);
  const tip = html("div", { class: "tip" }, figure);
  const hide = () => { line.setAttribute("visibility", "hidden"); tip.style.visibility = "hidden"; };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect(), at = (event.clientX - frame.left) * width / frame.width;
    const near = all.map((s) => { let best = 0; s.x.forEach((x, i) => { if (Math.abs(px(x) - at) < Math.abs(px(s.x[best]) - at)) best = i; }); return best; });
    const x = all[0].x[near[0]];
    line.setAttribute("x1", px(x)); line.setAttribute("x2", px(x)); line.setAttribute("visibility", "visible");
    tip.replaceChildren(html("div", {}, null, `${axisName()} ${short(x)}`));
    all.forEach((s, i) => { const row = html("div", {}, tip); html("span", { class: "key", style: `background:${s.color}` }, row); row.append(`${s.name} ${short(s.y[near[i]])}`); });
    const left = Math.min(Math.max(4, event.clientX - frame.left + 14), frame.width - tip.offsetWidth - 2);
    tip.style.left = `${Math.max(4, left)}px`; tip.style.top = "2.6rem"; tip.style.visibility = "visible";
  });
}
function axisName() { return { step: "step", tokens: "tokens", hours: "hours" }[axis]; }

// When each process ran, and what happened meanwhile.
function timeline(figure, run) {
  figure.replaceChildren();
  const width = Math.max(220, figure.clientWidth - 22), height = 74, svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "timeline" }, figure);
  const end = Math.max(run.hours, 1e-6), px = (h) => 8 + h / end * (width - 16);
  for (const p of run.processes) {
    const bar = make("rect", { x: px(p.start), y: 14, width: Math.max(1.5, px(p.end) - px(p.start)), height: 22, rx: 3, fill: "var(--c0)", opacity: .75 }, svg);
    make("title", {}, bar, p.text);
    if (p.lost > p.start) make("title", {}, make("rect", { x: px(p.lost), y: 14, width: Math.max(1, px(p.end) - px(p.lost)), height: 22, fill: "var(--bad)", opacity: .55 }, svg), "trained again after the restart");
  }
  const dot = (h, y, color, text) => make("title", {}, make("circle", { cx: px(h), cy: y, r: 3.2, fill: color }, svg), text);
  for (const c of run.checkpoints) dot(c.hours, 44, "var(--good)", c.text);
  for (const a of run.alerts) dot(a.hours, 6, a.kind === "restart" ? "var(--soft)" : "var(--bad)", a.text);
  const unit = end > 2 ? { name: "h", hours: 1 } : end > 1 / 30 ? { name: "min", hours: 1 / 60 } : { name: "s", hours: 1 / 3600 };
  for (const t of ticks(0, end / unit.hours, Math.min(8, width / 90))) {
    const x = px(t * unit.hours), anchor = x > width - 30 ? "end" : x < 20 ? "start" : "middle";
    make("line", { class: "axis", x1: x, x2: x, y1: 50, y2: 54 }, svg);
    make("text", { x, y: 67, "text-anchor": anchor }, svg, `${short(t)} ${unit.name}`);
  }
  make("line", { class: "axis", x1: 8, x2: width - 8, y1: 50, y2: 50 }, svg);
}
function accounts(figure, run) {
  figure.replaceChildren();
  const total = run.accounts.reduce((sum, a) => sum + a.seconds, 0), width = Math.max(220, figure.clientWidth - 22);
  const svg = make("svg", { viewBox: `0 0 ${width} 26`, height: 26, role: "img", "aria-label": "time accounts" }, figure), legend = html("div", { class: "legend" }, figure);
  let x = 0;
  run.accounts.forEach((a, i) => {
    const w = a.seconds / total * width, color = a.name === "between processes" ? "var(--line)" : `var(--c${[0, 3, 4, 2, 5, 6, 1][i % 7]})`;
    make("title", {}, make("rect", { x, y: 2, width: Math.max(0, w), height: 22, fill: color }, svg), `${a.name}: ${a.text}`);
    const item = html("span", {}, legend);
    html("i", { class: "box", style: `background:${color}` }, item);
    item.append(`${a.name} ${(100 * a.seconds / total).toFixed(1)} % (${a.text})`);
    x += w;
  });
}

function drawAll() {
  for (const figure of [...document.querySelectorAll(".chart[data-panel]")]) draw(figure, DATA.panels[figure.dataset.panel]);
  for (const figure of document.querySelectorAll("[data-timeline]")) timeline(figure, DATA.runs[figure.dataset.timeline]);
  for (const figure of document.querySelectorAll("[data-accounts]")) accounts(figure, DATA.runs[figure.dataset.accounts]);
}
for (const input of document.querySelectorAll("input[name=axis]")) input.addEventListener("change", () => { axis = input.value; drawAll(); });
let drawnWidth = 0;
new ResizeObserver(() => { if (document.body.clientWidth !== drawnWidth) { drawnWidth = document.body.clientWidth; drawAll(); } }).observe(document.body);
addEventListener("beforeprint", drawAll);
addEventListener("afterprint", drawAll);
