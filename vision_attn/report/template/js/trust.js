// How true the maps are: what `vision-attn evaluate` found, beside its controls.

const SERIES = ["1", "2", "3", "4", "5", "6", "7", "8"].map((number) => `var(--series-${number})`);
const DASHES = { random: "8 5", center: "2 4", edges: "10 4 2 4" };

function startTrust() {
  const place = byId("trust");
  const found = report.trust;
  if (!found) {
    place.append(element("p", { className: "note" }, "No evaluation belongs to this report. Whether a map is true is measured by"), element("pre", { tabIndex: 0 }, "vision-attn evaluate MODEL PHOTOS --out judged\nvision-attn report MODEL PHOTOS --evaluation judged"));
    return;
  }
  if (found.otherModel) place.append(element("p", { className: "wrong" }, "This evaluation is of another model than this report: other weights, classes or preprocessing."));
  const verdict = element("ol", { className: "verdict" }, ...found.verdict.map((sentence) => element("li", {}, sentence)));
  place.append(element("div", { className: "panel" }, element("h2", {}, `The verdict, from ${found.photos} photos`), verdict, ...found.remarks.map((text) => element("p", { className: "note" }, text))));
  place.append(element("div", { className: "panel" }, element("h2", {}, "Every number"), element("div", { className: "scroller", tabIndex: 0, role: "region", "aria-label": "Table of numbers" }, trustTable(found)), element("p", { className: "hint" }, "Means over photos with 95 % intervals. Colour and sign: better or worse than the best control, in pairs. The last rows know nothing of the model.")));
  const charts = ["deletion", "insertion"].map((kind) => curveChart(found, kind));
  place.append(element("div", { className: "panel" }, element("h2", {}, "The photo taken apart"), legendOf([...found.methods, ...found.controls], found), element("div", { className: "charts" }, ...charts)));
  if (found.healthFigure) {
    const image = element("img", { src: found.healthFigure, alt: `Attention health: ${found.health.join(" ")}` });
    place.append(element("div", { className: "panel" }, element("h2", {}, "The attention itself"), element("ul", { className: "verdict" }, ...found.health.map((text) => element("li", {}, text))), element("div", { className: "paper" }, image)));
  }
  const versions = Object.entries(found.versions).map(([name, version]) => `${name} ${version}`).join(", ");
  const protocol = Object.entries(found.protocol).filter(([, value]) => value !== null).map(([name, value]) => `${name} ${value}`).join(", ");
  const facts = factList({ Folder: found.folder, Protocol: protocol, Versions: versions });
  place.append(element("div", { className: "panel" }, element("h2", {}, "How it was measured"), facts));
}

function trustTable(found) {
  const head = element("tr", {}, element("th", { scope: "col" }, "method"), ...found.metrics.map((metric) => element("th", { scope: "col", title: metric.meaning }, metric.title)));
  const rows = [...found.methods, ...found.controls].map((method) => {
    const cells = found.metrics.map((metric) => {
      const [mean, low, high, words] = found.table[method]?.[metric.name] ?? [null, null, null, ""];
      const kind = words.startsWith("better") ? "better" : words.startsWith("worse") ? "worse" : "";
      const cell = element("td", { className: kind, title: words }, short(mean), mean === null || low === null ? "" : " ");
      if (low !== null && low !== undefined) cell.append(element("small", {}, `(${low.toFixed(2)} to ${high.toFixed(2)})`));
      if (kind) cell.append(kind === "better" ? " +" : " -");
      return cell;
    });
    const control = found.controls.includes(method);
    return element("tr", { className: control ? "control" : "" }, element("td", {}, control ? `${method} (control)` : method), ...cells);
  });
  return element("table", { className: "numbers" }, element("thead", {}, head), element("tbody", {}, ...rows));
}

function seriesColour(name, found) {
  return found.controls.includes(name) ? "var(--control)" : SERIES[found.methods.indexOf(name) % SERIES.length];
}

function legendOf(names, found) {
  const items = names.map((name) => {
    const line = drawn("line", { x1: 0, x2: 28, y1: 5, y2: 5, "stroke-width": 2.5, ...(name in DASHES ? { "stroke-dasharray": DASHES[name] } : {}) });
    line.style.stroke = seriesColour(name, found);
    return element("li", {}, drawn("svg", { viewBox: "0 0 28 10", "aria-hidden": "true" }, line), name);
  });
  return element("ul", { className: "legend" }, ...items);
}

function curveChart(found, kind) {
  const words = kind === "deletion" ? "most relevant removed first (lower is better)" : "most relevant shown first (higher is better)";
  const series = [...found.methods, ...found.controls]
    .filter((name) => found.curves[name]?.[kind])
    .map((name) => ({
      points: found.curves[name][kind].map(([mean], index) => [found.fractions[index], mean]),
      band: found.controls.includes(name) ? [] : found.curves[name][kind].map(([, low, high], index) => [found.fractions[index], low, high]),
      colour: seriesColour(name, found),
      dash: DASHES[name],
      name,
    }));
  return lineChart(series, { title: words, x: `share of the photo ${kind === "deletion" ? "removed" : "shown"}`, y: "probability of the class" });
}

/** Returns a new element of a drawing. */
function drawn(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Returns even marks of an axis, 1, 2, 2.5 or 5 times a power of ten apart, the first at or below `low`, the last at or above `high`. */
function marksOf(low, high) {
  const rough = (high - low || 1) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((times) => times * power).find((one) => one >= rough);
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: Math.max(last - first, 1) + 1 }, (_, index) => (first + index) * step);
}

/** Returns a figure with lines, as SVG, in the colours of the theme. */
function lineChart(series, { title, x, y }) {
  const points = series.flatMap((one) => [...one.points, ...(one.band ?? []).flatMap(([at, low, high]) => [[at, low], [at, high]])]).filter(([, value]) => value !== null);
  const across = marksOf(0, Math.max(...points.map(([at]) => at)));
  const up = marksOf(Math.min(0, ...points.map(([, value]) => value)), Math.max(...points.map(([, value]) => value)));
  const most = across[across.length - 1], low = up[0], high = up[up.length - 1];
  const toX = (value) => 46 + (value / most) * 330;
  const toY = (value) => 214 - ((value - low) / (high - low)) * 196;
  const chart = drawn("svg", { viewBox: "0 0 390 250", role: "img", "aria-label": `${title}: ${series.map((one) => one.name).join(", ")}` });
  for (const level of up) {
    chart.append(drawn("line", { x1: 46, x2: 376, y1: toY(level), y2: toY(level), class: "grid" }), drawn("text", { x: 40, y: toY(level) + 4, "text-anchor": "end" }, short(level)));
  }
  for (const at of across) chart.append(drawn("text", { x: toX(at), y: 230, "text-anchor": "middle" }, short(at)));
  for (const one of series) {
    const band = (one.band ?? []).filter(([, bottom]) => bottom !== null);
    if (!band.length) continue;
    const edge = [...band.map(([at, , top]) => [at, top]), ...band.map(([at, bottom]) => [at, bottom]).reverse()];
    const area = drawn("polygon", { points: edge.map(([at, value]) => `${toX(at).toFixed(1)},${toY(value).toFixed(1)}`).join(" "), class: "band" });
    area.style.fill = one.colour;
    chart.append(area);
  }
  for (const one of series) {
    const path = one.points.filter(([, value]) => value !== null).map(([at, value], index) => `${index ? "L" : "M"}${toX(at).toFixed(1)} ${toY(value).toFixed(1)}`).join("");
    const line = drawn("path", { d: path, ...(one.dash ? { "stroke-dasharray": one.dash } : {}) }, drawn("title", {}, one.name));
    line.style.stroke = one.colour;
    chart.append(line);
  }
  chart.append(drawn("text", { x: 211, y: 246, "text-anchor": "middle" }, x), drawn("text", { x: 46, y: 10 }, y));
  const caption = title === y ? [] : [element("figcaption", { className: "note" }, title)];
  return element("figure", { style: "margin:0" }, ...caption, chart);
}
