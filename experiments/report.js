// Curves, and alphas over time, from the JSON in the page. Text is set as text, never as HTML.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg"; // a name; nothing is fetched
const INK = "#24292f", PALE = "#d0d7de";
const hidden = new Set(); // indices of runs that are not shown

function add(parent, tag, attributes = {}, text = null) {
  const svg = tag === "svg" || parent.namespaceURI === SVG;
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  parent.append(element);
  return element;
}

function format(value) {
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) {
    return String(Number(value.toPrecision(4)).toExponential()).replace("e+", "e");
  }
  return String(Number(value.toPrecision(4)));
}

// Curves: one chart a metric, all runs in it.

const WIDTH = 500, HEIGHT = 260, LEFT = 62, RIGHT = 10, TOP = 10, BOTTOM = 38;

function linearTicks(low, high, count, least = 0) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(least, power * [1, 2, 5, 10].find((m) => m * power >= rough));
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return ticks;
}

function logTicks(low, high) {
  const wide = Math.log10(high / low) > 4;
  const ticks = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.log10(high); p++) {
    for (const m of wide ? [1] : [1, 2, 5]) ticks.push(m * 10 ** p);
  }
  const inside = ticks.filter((tick) => tick >= low && tick <= high);
  return inside.length > 1 ? inside : linearTicks(low, high, 4);
}

function range(values, pad) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low < high) return [low - pad * (high - low), high + pad * (high - low)];
  return [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10];
}

function scale([low, high], start, end) {
  return (value) => start + ((value - low) / (high - low)) * (end - start);
}

function drawChart(figure, chart, logarithmic) {
  const svg = figure.querySelector("svg");
  svg.replaceChildren();
  const curves = chart.curves.filter((curve) => !hidden.has(curve.run));
  figure.points = [];
  if (!curves.length) return;
  const ys = curves.flatMap((curve) => curve.y);
  const log = logarithmic && ys.every((y) => y > 0);
  const to = log ? Math.log10 : (value) => value, from = log ? (v) => 10 ** v : (v) => v;
  const xRange = range(curves.flatMap((curve) => curve.x), 0.02);
  const yRange = range(ys.map(to), 0.05);
  const x = scale(xRange, LEFT, WIDTH - RIGHT), y = scale(yRange, HEIGHT - BOTTOM, TOP);
  const [low, high] = yRange.map(from);
  for (const tick of log ? logTicks(low, high) : linearTicks(low, high, 5)) {
    const at = y(to(tick));
    add(svg, "line", { x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at, stroke: PALE });
    add(svg, "text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, format(tick));
  }
  for (const tick of linearTicks(...xRange, 6, 1)) {
    const at = x(tick);
    add(svg, "line", { x1: at, x2: at, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 4, stroke: INK });
    add(svg, "text", { x: at, y: HEIGHT - BOTTOM + 17, "text-anchor": "middle" }, format(tick));
  }
  const middle = (LEFT + WIDTH - RIGHT) / 2;
  add(svg, "text", { x: middle, y: HEIGHT - 4, "text-anchor": "middle" }, chart.kind);
  for (const curve of curves) {
    const { colour, dash } = data.runs[curve.run];
    const points = curve.x.map((value, i) => [x(value), y(to(curve.y[i]))]);
    const stroke = { fill: "none", stroke: colour, "stroke-width": 1.6, "stroke-dasharray": dash };
    add(svg, "polyline", { points: points.map((p) => p.map((v) => v.toFixed(1))).join(" "), ...stroke });
    points.forEach(([cx, cy], i) => {
      if (points.length <= 20) add(svg, "circle", { cx, cy, r: 2.4, fill: colour });
      figure.points.push({ cx, cy, run: curve.run, x: curve.x[i], y: curve.y[i] });
    });
  }
  figure.mark = add(svg, "circle", { r: 5, fill: "none", stroke: INK, visibility: "hidden" });
}

function point(figure, chart, event) {
  const box = figure.querySelector("svg").getBoundingClientRect();
  const px = ((event.clientX - box.left) / box.width) * WIDTH;
  const py = ((event.clientY - box.top) / box.height) * HEIGHT;
  let nearest = null, least = Infinity;
  for (const candidate of figure.points) {
    const distance = (candidate.cx - px) ** 2 + (candidate.cy - py) ** 2;
    if (distance < least) [nearest, least] = [candidate, distance];
  }
  if (!nearest) return;
  for (const name of ["cx", "cy"]) figure.mark.setAttribute(name, nearest[name]);
  figure.mark.setAttribute("visibility", "visible");
  const text = `${data.runs[nearest.run].name}, ${chart.kind} ${nearest.x}: ${format(nearest.y)}`;
  figure.querySelector("output").textContent = text;
}

function showCurves() {
  const logarithmic = document.getElementById("logarithmic");
  const charts = data.charts.map((chart) => {
    const figure = add(document.getElementById(chart.place), "figure", { class: "chart" });
    add(figure, "figcaption", {}, chart.metric);
    const label = `${chart.metric} by ${chart.kind}`;
    add(figure, "svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
    add(figure, "output", {}, "\u00a0");
    figure.addEventListener("pointermove", (event) => point(figure, chart, event));
    return () => drawChart(figure, chart, logarithmic.checked);
  });
  const draw = () => charts.forEach((each) => each());
  logarithmic.addEventListener("change", draw);
  document.querySelectorAll("#legend input").forEach((box, run) => {
    box.addEventListener("change", () => {
      hidden[box.checked ? "delete" : "add"](run);
      draw();
    });
  });
  draw();
}

// Alphas: one heat map a cell, one row an edge, one column an operation.

const BOX = 34, ROW = 19, LABELS = 92, HEADS = 84, GAP = 5;

function mix(share) { // from white to a blue
  const part = (low) => Math.round(255 + (low - 255) * share);
  return `rgb(${part(0)}, ${part(0x72)}, ${part(0xb2)})`;
}

function drawCell(parent, cell) {
  const figure = add(parent, "figure", { class: "alpha" });
  add(figure, "figcaption", {}, cell.name);
  const nodes = cell.edges.map((edge) => edge[1]);
  const top = (row) => HEADS + row * ROW + GAP * (nodes[row] - nodes[0]);
  const width = LABELS + cell.operations.length * BOX + 50;
  const height = top(nodes.length - 1) + ROW + 2;
  const size = { viewBox: `0 0 ${width} ${height}`, width, role: "img" };
  const svg = add(figure, "svg", { ...size, "aria-label": `softmax of alpha, ${cell.name}` });
  cell.operations.forEach((operation, column) => {
    const x = LABELS + (column + 0.5) * BOX, y = HEADS - 6;
    add(svg, "text", { transform: `translate(${x} ${y}) rotate(-45)` }, operation);
  });
  const boxes = cell.edges.map(([source, node], row) => {
    const label = `${cell.states[source]} → ${cell.states[node]}`;
    add(svg, "text", { x: LABELS - 8, y: top(row) + 14, "text-anchor": "end" }, label);
    return cell.operations.map((_, column) => {
      const x = LABELS + column * BOX;
      const place = { x: x + 1, y: top(row) + 1, width: BOX - 2, height: ROW - 2 };
      const rect = add(svg, "rect", { ...place, "stroke-width": 2 });
      const text = add(svg, "text", { x: x + BOX / 2, y: top(row) + 14, "text-anchor": "middle" });
      return [rect, text];
    });
  });
  const share = scale(range(cell.weights.flat(2), 0), 0, 1);
  return (frame) => {
    const kept = new Set(cell.kept[frame].map(String));
    boxes.forEach((row, edge) => row.forEach(([rect, text], operation) => {
      const weight = cell.weights[frame][edge][operation];
      rect.setAttribute("fill", mix(share(weight)));
      rect.setAttribute("stroke", kept.has(`${edge},${operation}`) ? "#D55E00" : "none");
      text.textContent = (100 * weight).toFixed(1);
      text.setAttribute("fill", share(weight) > 0.8 ? "#fff" : INK);
    }));
  };
}

function showAlphas() {
  const slider = document.getElementById("epoch");
  if (!slider) return;
  const button = document.getElementById("play"), output = document.getElementById("shown");
  const epochs = [...new Set(data.alphas.flatMap((run) => run.epochs))].sort((a, b) => a - b);
  const runs = data.alphas.map((run) => {
    const section = add(document.getElementById("alphas"), "section");
    const heading = add(section, "h3");
    const cells = run.cells.map((cell) => drawCell(section, cell));
    return (epoch) => {
      // A run that has ended stays as it was then.
      const frame = Math.max(0, run.epochs.findLastIndex((each) => each <= epoch));
      const names = [data.runs[run.run].name, run.of].filter(Boolean).join(", ");
      heading.textContent = `${names}, after epoch ${run.epochs[frame]}`;
      cells.forEach((draw) => draw(frame));
    };
  });
  let timer = null;
  const show = () => {
    const epoch = epochs[slider.value];
    output.textContent = `epoch ${epoch} of ${epochs.at(-1)}`;
    runs.forEach((draw) => draw(epoch));
  };
  const stop = () => {
    clearInterval(timer);
    timer = null;
    button.textContent = "Play";
  };
  const advance = () => {
    slider.value = Number(slider.value) + 1;
    show();
    if (slider.value === slider.max) stop();
  };
  slider.max = epochs.length - 1;
  slider.value = slider.max;
  slider.addEventListener("input", () => { stop(); show(); });
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (slider.value === slider.max) slider.value = 0;
    show();
    button.textContent = "Pause";
    timer = setInterval(advance, Math.min(600, Math.max(80, 10000 / epochs.length)));
  });
  button.disabled = epochs.length < 2;
  slider.disabled = epochs.length < 2;
  show();
}

showCurves();
showAlphas();
