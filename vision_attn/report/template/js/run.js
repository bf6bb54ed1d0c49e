// The model, the data, the training run, mistakes by class, and how to make the page again.

function startRun() {
  const place = byId("run");
  const { model, run } = report;
  const facts = {
    Model: `${model.name}, ${(model.parameters / 1e6).toFixed(1)} million parameters`,
    Input: `${model.input[1]} x ${model.input[0]} px`,
    Classes: model.classes.length ? `${model.classes.length}: ${model.classes.slice(0, 30).join(", ")}${model.classes.length > 30 ? ", ..." : ""}` : "none",
    Photos: `${report.photos.length}${report.damaged.length ? `, and ${report.damaged.length} that could not be read` : ""}`,
    Methods: report.methods.map((method) => `${method.name} ${describe(method.options)}`).join("; "),
    Made: report.made,
    Command: report.command || "from Python",
    Versions: Object.entries(report.versions).map(([name, version]) => `${name} ${version}`).join(", "),
  };
  if (run) Object.assign(facts, { Run: run.folder, ...scoresOf(run) });
  place.append(panel("This report", factList(facts)));
  const notes = [...report.notes, ...report.damaged];
  if (notes.length) place.append(panel("What is not shown", element("ul", { className: "verdict" }, ...notes.map((text) => element("li", {}, text)))));
  const own = countsOf(report.photos);
  if (own) place.append(panel("Photos of this report, by class", matrixOf(own)));
  if (run?.confusion) place.append(panel(`Confusion matrix of the run (${run.tested})`, matrixOf({ ...run.confusion, indices: run.confusion.classes.map((name) => model.classes.indexOf(name)) })));
  if (run && Object.keys(run.curves).length) {
    const groups = [["loss", /loss/], ["accuracy", /top1|f1/]];
    const charts = groups
      .map(([name, pattern]) => [name, Object.entries(run.curves).filter(([key]) => pattern.test(key))])
      .filter(([, curves]) => curves.length)
      .map(([name, curves]) => {
        const series = curves.map(([key, points], index) => ({ name: key, points, colour: SERIES[index] }));
        const list = legendOf(series.map((one) => one.name), { controls: [], methods: series.map((one) => one.name) });
        return element("div", {}, list, lineChart(series, { title: name, x: "step", y: name }));
      });
    place.append(panel("Training", element("div", { className: "charts" }, ...charts)));
  }
  if (run) place.append(panel("Configuration", element("pre", { tabIndex: 0 }, run.config)));
  const again = run ? `vision-attn fit --config ${run.folder}/config.yaml --run_dir runs/again\n${report.command}` : report.command;
  if (again) place.append(panel("How to make it again", element("pre", { tabIndex: 0 }, again)));
}

function describe(options) {
  const words = Object.entries(options).map(([name, value]) => `${name} = ${value}`).join(", ");
  return words ? `(${words})` : "";
}

function scoresOf(run) {
  const found = Object.entries(run.scores).map(([name, value]) => `${name} ${short(value)}`).join(", ");
  const fit = run.fit.seconds ? `${Math.round(run.fit.seconds)} s, ${run.fit.epochs} epochs on ${run.fit.device}` : "";
  return { ...(found ? { [run.tested]: found } : {}), ...(fit ? { Trained: fit } : {}) };
}

function panel(title, ...content) {
  return element("div", { className: "panel" }, element("h2", {}, title), ...content);
}

function factList(facts) {
  return element("dl", { className: "facts" }, ...Object.entries(facts).flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]));
}

/** Returns how often each class was taken for each, on this report's photos; null where no truth is known. */
function countsOf(photos) {
  const known = photos.filter((photo) => photo.truth !== null && photo.top.length);
  if (!known.length) return null;
  const indices = [...new Set(known.flatMap((photo) => [photo.truth, prediction(photo)]))].sort((one, other) => one - other);
  const counts = indices.map((truth) => indices.map((taken) => known.filter((photo) => photo.truth === truth && prediction(photo) === taken).length));
  return { classes: indices.map(className), indices, counts };
}

function matrixOf({ classes, indices, counts }) {
  const most = Math.max(...counts.flat(), 1);
  const head = element("tr", {}, element("th", {}, "true \\ predicted"), ...classes.map((name) => element("th", { scope: "col", title: name }, name)));
  const rows = counts.map((row, i) => {
    const cells = row.map((count, j) => {
      const here = report.photos.filter((photo) => photo.truth === indices[i] && prediction(photo) === indices[j]).length;
      const words = `${classes[i]} taken for ${classes[j]}: ${count}; ${here} of them in this report`;
      const cell = element("button", { type: "button", title: words, "aria-label": words, disabled: !here }, String(count));
      const share = Math.sqrt(count / most) * 70;
      cell.style.background = count ? `color-mix(in srgb, ${i === j ? "var(--right)" : "var(--wrong)"} ${Math.round(share / 2)}%, var(--panel))` : "var(--panel)";
      cell.addEventListener("click", () => showCell(indices[i], indices[j]));
      return element("td", {}, cell);
    });
    return element("tr", {}, element("th", { scope: "row", title: classes[i] }, classes[i]), ...cells);
  });
  const table = element("table", { className: "confusion" }, element("thead", {}, head), element("tbody", {}, ...rows));
  return element("div", { className: "scroller", tabIndex: 0, role: "region", "aria-label": "Confusion matrix" }, table);
}

/** Shows the photos of one cell in the gallery. */
function showCell(truth, taken) {
  byId("filter-class").value = "";
  byId("filter-right").value = "";
  gallery.cell = [truth, taken];
  showCards();
  showTab("gallery");
}
