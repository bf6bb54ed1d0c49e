// How true the maps are: what `vision-attn evaluate` found, beside its controls.

const SERIES = ["1", "2", "3", "4", "5", "6", "7", "8"].map((number) => `var(--series-${number})`);
const DASHES = { random: "8 5", center: "2 4", edges: "10 4 2 4" };

function startTrust() {
  const place = byId("trust");
  const found = report.trust;
  if (!found) {
    place.append(element("p", { className: "note" }, "No evaluation belongs to this report. Whether a map is true is measured by"), element("pre", {}, "vision-attn evaluate MODEL PHOTOS --out judged\nvision-attn report MODEL PHOTOS --evaluation judged"));
    return;
  }
  const verdict = element("ol", { className: "verdict" }, ...found.verdict.map((sentence) => element("li", {}, sentence)));
  place.append(element("div", { className: "panel" }, element("h2", {}, `The verdict, from ${found.photos} photos`), verdict, ...found.remarks.map((text) => element("p", { className: "note" }, text))));
  place.append(element("div", { className: "panel" }, element("h2", {}, "Every number"), element("div", { className: "scroller", tabIndex: 0, role: "region", "aria-label": "Table of numbers" }, trustTable(found)), element("p", { className: "hint" }, "Means over photos with 95 % intervals. Colour: better or worse than the best control, in pairs. The last rows know nothing of the model.")));
  const charts = ["deletion", "insertion"].map((kind) => curveChart(found, kind));
  place.append(element("div", { className: "panel" }, element("h2", {}, "The photo taken apart"), legendOf([...found.methods, ...found.controls], found), element("div", { className: "charts" }, ...charts)));
  if (found.healthFigure) {
    const image = element("img", { src: found.healthFigure, alt: `Attention health: ${found.health.join(" ")}` });
    place.append(element("div", { className: "panel" }, element("h2", {}, "The attention itself"), element("ul", { className: "verdict" }, ...found.health.map((text) => element("li", {}, text))), element("div", { className: "paper" }, image)));
  }
  const versions = Object.entries(found.versions).map(([name, version]) => `${name} ${version}`).join(", ");
  place.append(element("p", { className: "note" }, `From ${found.folder}, with ${versions}; ${JSON.stringify(found.protocol)}`));
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
    const line = element("span");
    line.style.borderTopColor = seriesColour(name, found);
    if (name in DASHES) line.style.borderTopStyle = "dashed";
    return element("li", {}, line, name);
  });
  return element("ul", { className: "legend" }, ...items);
}

function curveChart(found, kind) {
  const words = kind === "deletion" ? "most relevant removed first (lower is better)" : "most relevant shown first (higher is better)";
  const series = [...found.methods, ...found.controls]
    .filter((name) => found.curves[name]?.[kind])
    .map((name) => ({
      points: found.curves[name][kind].map(([mean], index) => [found.fractions[index], mean]),
      colour: seriesColour(name, found),
      dash: DASHES[name],
      name,
    }));
  return lineChart(series, { title: words, x: `share of the photo ${kind === "deletion" ? "removed" : "shown"}`, y: "probability of the class" });
}

/** Returns a figure with lines, as SVG, in the colours of the theme. */
function lineChart(series, { title, x, y }) {
  const make = (tag, attributes, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  const points = series.flatMap((one) => one.points).filter(([, value]) => value !== null);
  const most = Math.max(...points.map(([at]) => at), 1e-9), high = Math.max(...points.map(([, value]) => value), 1e-9);
  const low = Math.min(0, ...points.map(([, value]) => value));
  const toX = (value) => 46 + (value / most) * 330;
  const toY = (value) => 214 - ((value - low) / (high - low)) * 196;
  const chart = make("svg", { viewBox: "0 0 390 250", role: "img", "aria-label": `${title}: ${series.map((one) => one.name).join(", ")}` });
  for (let step = 0; step <= 4; step++) {
    const level = low + ((high - low) * step) / 4;
    chart.append(make("line", { x1: 46, x2: 376, y1: toY(level), y2: toY(level), class: "grid" }), make("text", { x: 40, y: toY(level) + 4, "text-anchor": "end" }, short(level)));
    chart.append(make("text", { x: toX((most * step) / 4), y: 230, "text-anchor": "middle" }, short((most * step) / 4)));
  }
  for (const one of series) {
    const path = one.points.filter(([, value]) => value !== null).map(([at, value], index) => `${index ? "L" : "M"}${toX(at).toFixed(1)} ${toY(value).toFixed(1)}`).join("");
    const line = make("path", { d: path, ...(one.dash ? { "stroke-dasharray": one.dash } : {}) }, make("title", {}, one.name));
    line.style.stroke = one.colour;
    chart.append(line);
  }
  chart.append(make("text", { x: 211, y: 246, "text-anchor": "middle" }, x), make("text", { x: 46, y: 10 }, y));
  return element("figure", { style: "margin:0" }, element("figcaption", { className: "note" }, title), chart);
}
