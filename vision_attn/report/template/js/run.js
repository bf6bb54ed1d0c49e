// The model, the data, the training run, mistakes by class, and how to make the page again.

function startRun() {
  const place = byId("run");
  const { model, run } = report;
  const facts = {
    Model: `${model.name}, ${(model.parameters / 1e6).toFixed(1)} million parameters`,
    Input: `${model.input[1]} x ${model.input[0]} px`,
    Classes: model.classes.length ? `${model.classes.length}: ${model.classes.slice(0, 30).join(", ")}${model.classes.length > 30 ? ", ..." : ""}` : "none",
    Probabilities: `${model.multiLabel ? "of each class by itself" : "of all classes, 100 % together"}${model.temperature === 1 ? "" : `, calibrated: temperature ${short(model.temperature)}`}`,
    Photos: `${report.photos.length}${report.damaged.length ? `, and ${report.damaged.length} that could not be read` : ""}`,
    Methods: report.methods.map((method) => `${method.name} ${describe(method.options)}`).join("; "),
    Made: report.made,
    Command: report.command || "from Python",
    Versions: Object.entries(report.versions).map(([name, version]) => `${name} ${version}`).join(", "),
  };
  if (run) Object.assign(facts, { Run: run.folder, ...(run.data ? { "Trained on": run.data } : {}), ...scoresOf(run) });
  place.append(panel("This report", factList(facts)));
  const notes = [...report.notes, ...report.damaged];
  if (notes.length) place.append(panel("What is not shown", element("ul", { className: "verdict" }, ...notes.map((text) => element("li", {}, text)))));
  const counted = countedPhotos(), own = countsOf(counted);
  if (own) place.append(panel("Photos of this report, by class", matrixOf(own, "Photos of this report, by class", counted)));
  if (run?.confusion) {
    const title = `Confusion matrix of the run (${run.tested})`;
    place.append(panel(title, matrixOf({ ...run.confusion, indices: run.confusion.classes.map((name) => model.classes.indexOf(name)) }, title, counted)));
  }
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

const MOST_CLASSES = 40; // of a matrix: more would be read by nobody, and built for seconds

/** Returns how many of this report's photos are of one class and were taken for another. */
function countedPhotos() {
  const counts = new Map();
  for (const photo of report.photos) {
    if (photo.truth === null || !photo.top.length) continue;
    const key = `${photo.truth} ${prediction(photo)}`;
    counts.set(key, (counts.get(key) ?? 0) + 1);
  }
  return counts;
}

/** Returns how often each class was taken for each, on this report's photos; null where no truth is known. */
function countsOf(counted) {
  if (!counted.size) return null;
  const indices = [...new Set([...counted.keys()].flatMap((key) => key.split(" ").map(Number)))].sort((one, other) => one - other);
  const place = new Map(indices.map((index, at) => [index, at]));
  const counts = indices.map(() => new Array(indices.length).fill(0));
  for (const [key, count] of counted) {
    const [truth, taken] = key.split(" ").map((index) => place.get(Number(index)));
    counts[truth][taken] = count;
  }
  return { classes: indices.map(className), indices, counts };
}

/** Returns the classes of a matrix that are shown: all, or those that take part in most confusions. */
function shownClasses(counts) {
  const all = counts.map((_, index) => index);
  if (all.length <= MOST_CLASSES) return all;
  const mistakes = all.map((i) => all.reduce((sum, j) => sum + (i === j ? 0 : counts[i][j] + counts[j][i]), 0));
  return all.sort((one, other) => mistakes[other] - mistakes[one]).slice(0, MOST_CLASSES).sort((one, other) => one - other);
}

function matrixOf({ classes, indices, counts }, title, counted) {
  const shown = shownClasses(counts);
  const most = counts.reduce((high, row) => row.reduce((one, other) => Math.max(one, other), high), 1);
  const head = element("tr", {}, element("th", {}, "true \\ predicted"), ...shown.map((j) => element("th", { scope: "col", title: classes[j] }, classes[j])));
  const rows = shown.map((i) => {
    const cells = shown.map((j) => {
      const count = counts[i][j];
      const here = counted.get(`${indices[i]} ${indices[j]}`) ?? 0;
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
  const whole = element("div", { className: "scroller", tabIndex: 0, role: "region", "aria-label": title }, table);
  if (shown.length === classes.length) return whole;
  return element("div", {}, element("p", { className: "note" }, `Of ${classes.length} classes the ${shown.length} that take part in most confusions.`), whole);
}

/** Shows the photos of one cell in the gallery. */
function showCell(truth, taken) {
  byId("filter-class").value = "";
  byId("filter-right").value = "";
  gallery.cell = [truth, taken];
  showCards();
  showTab("gallery");
}
