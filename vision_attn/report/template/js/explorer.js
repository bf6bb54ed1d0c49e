// One photo: where the answer comes from, and what attends to what, layer by layer, head by head.

const explorer = { photo: null, query: null, pinned: false, layers: [], cells: [], shown: null };

function startExplorer() {
  const choice = byId("photo");
  report.photos.forEach((photo, index) => {
    const mark = photo.attention?.full || photo.classMaps ? " (all layers)" : "";
    choice.append(element("option", { value: String(index) }, `${index + 1}: ${photo.name}${mark}`));
  });
  choice.addEventListener("change", () => openPhoto(report.photos[Number(choice.value)], false));
  byId("previous").addEventListener("click", () => stepPhoto(-1));
  byId("next").addEventListener("click", () => stepPhoto(1));
  byId("map-choice").addEventListener("change", drawMapPanel);
  byId("map-strength").addEventListener("input", () => {
    byId("map-strength-value").textContent = `${byId("map-strength").value} %`;
    drawMapPanel();
  });
  byId("asker").addEventListener("change", chooseAsker);
  for (const id of ["direction", "layer", "head"]) byId(id).addEventListener("change", drawAttention);
  byId("follow").addEventListener("change", () => (explorer.pinned = !byId("follow").checked));
  const canvas = byId("attention-canvas");
  canvas.addEventListener("pointermove", hovered);
  canvas.addEventListener("click", clicked);
  canvas.addEventListener("keydown", movedByKey);
  byId("difference-a").addEventListener("change", drawDifference);
  byId("difference-b").addEventListener("change", drawDifference);
}

function stepPhoto(step) {
  const among = gallery.shown.includes(explorer.photo) ? gallery.shown : report.photos;
  const at = among.indexOf(explorer.photo) + step;
  if (at >= 0 && at < among.length) openPhoto(among[at], false);
}

/** Shows a photo in the explorer; and the explorer, unless told otherwise. */
const openPhoto = counted(async (photo, show = true) => {
  explorer.photo = photo;
  explorer.layers = []; // of the photo before
  if (show) showTab("explorer", false);
  byId("photo").value = String(report.photos.indexOf(photo));
  const among = gallery.shown.includes(photo) ? gallery.shown : report.photos;
  byId("previous").disabled = among.indexOf(photo) === 0;
  byId("next").disabled = among.indexOf(photo) === among.length - 1;
  fillMapChoice(photo);
  fillAnswers(photo);
  await Promise.all([drawMapPanel(), openAttention(photo), openClassMaps(photo)]);
});

// ------------------------------------------------------------------------------------------------ the answer

function fillMapChoice(photo) {
  const choice = byId("map-choice");
  const before = choice.value;
  const options = photo.maps.map((map, index) => [`m${index}`, report.methods[map.method].name]);
  (photo.classMaps ?? []).forEach((map, index) => {
    if (map.class !== prediction(photo)) options.push([`c${index}`, `${report.methods[map.method].name}: ${className(map.class)}`]);
  });
  choice.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
  choice.value = options.some(([value]) => value === before) ? before : `m${gallery.method}`;
}

function chosenMap() {
  const value = byId("map-choice").value;
  const from = value[0] === "c" ? explorer.photo.classMaps : explorer.photo.maps;
  return from[Number(value.slice(1))];
}

const drawMapPanel = counted(async () => {
  const photo = explorer.photo;
  if (!photo || byId("explorer").hidden) return;
  const map = chosenMap();
  const method = report.methods[map.method];
  const canvas = byId("map-canvas");
  const [width, height] = fitted(photo, 720, 640);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const of = method.asksForClass ? ` for ${className(map.class) || "the answer"}` : ", the same for every class";
  canvas.setAttribute("aria-label", `${photo.name}, overlay by ${method.name}${of}`);
  const given = valuesOf(map);
  if (!(await drawMap(canvas, photo, gallery.bare ? null : given, { strength: byId("map-strength").value / 100 }))) return;
  const values = await given;
  if (values) showScale(byId("map-scale"), scaleOf(values), `${method.name}${of}; this map, lowest to highest`);
  else byId("map-scale").replaceChildren(`${method.name} gave values that are not numbers: nothing is drawn`);
});

function fillAnswers(photo) {
  const rows = photo.top.map(([index, share]) => {
    const bar = element("div");
    bar.style.width = `${Math.max(share * 100, 0.5)}%`;
    const truth = index === photo.truth ? " (true)" : "";
    return element("tr", {}, element("td", {}, className(index) + truth), element("td", {}, percent(share)), element("td", { className: "line" }, bar));
  });
  const body = element("table", { className: "answers", "aria-label": "Likeliest classes" }, ...rows);
  const parts = rows.length ? [body] : [];
  if (photo.truth !== null) {
    const right = isRight(photo);
    parts.unshift(element("p", { className: right ? "right" : "wrong" }, right ? "The answer is right." : `The answer is wrong: it is ${className(photo.truth)}.`));
  }
  byId("answers").replaceChildren(...parts, element("p", { className: "note" }, `${photo.file}, ${photo.size[1]} x ${photo.size[0]} px`));
}

// ------------------------------------------------------------------------------------------------ attention

const openAttention = counted(async (photo) => {
  const found = photo.attention;
  byId("attention-controls").hidden = !found;
  byId("attention-words").hidden = !found;
  byId("attention-tokens").replaceChildren();
  byId("heads").hidden = !found;
  explorer.layers = [];
  explorer.shown = null;
  const canvas = byId("attention-canvas");
  const [width, height] = fitted(photo, 720, 640);
  Object.assign(canvas, { width, height });
  if (!found) {
    await drawMap(canvas, photo, null);
    byId("attention-scale").replaceChildren();
    byId("attention-marks").textContent = "";
    byId("attention-notes").textContent = report.notes.filter((note) => /^(no attention|not shown)/.test(note)).join(" ") || `No attention was kept for this report${report.attention === "none" ? ": --attention none" : ""}.`;
    byId("explored-note").textContent = "";
    return;
  }
  const layers = await Promise.all(
    found.layers.map(async (layer) => {
      const [steps, largest, toPrefix] = await Promise.all([layer.steps, layer.largest, layer.toPrefix].map((number) => (number === null ? null : blob(number))));
      return { ...layer, weights: weightsOf(layer, found.levels, steps, floatsOf(largest), toPrefix && floatsOf(toPrefix)) };
    }),
  );
  if (explorer.photo !== photo) return;
  explorer.layers = layers;
  const last = layers.length - 1;
  fill("layer", layers.map((layer, index) => [index, `${layers.length > 1 ? index : "last"}: ${layer.name}`]), last);
  byId("layer").disabled = layers.length < 2;
  const rollout = canRollOut();
  const direction = byId("direction");
  direction.querySelector("[value=rollout]").disabled = !rollout;
  if (!rollout && direction.value === "rollout") direction.value = "to";
  const tokens = prefixNames(layers.reduce((one, other) => (other.prefix.length > one.prefix.length ? other : one)));
  const before = byId("asker").value;
  fill("asker", [...tokens.map((name, index) => [`t${index}`, name]), ["mean", "mean of all patches"], ["patch", "a patch (click one)"]], tokens.length ? "t0" : "mean");
  if ([...byId("asker").options].some((option) => option.value === before)) byId("asker").value = before;
  explorer.query = explorer.query && byId("asker").value === "patch" ? explorer.query : { u: 0.5, v: 0.5 };
  explorer.pinned = false;
  byId("follow").checked = true;
  byId("explored-note").textContent = found.full ? "" : "of this photo the last layer is kept; --explored N keeps all layers of more photos";
  byId("attention-marks").textContent = "";
  buildHeads();
  await drawAttention();
});

function floatsOf(bytes) {
  return new Float32Array(bytes.slice().buffer);
}

/** Returns the weights of a layer, heads x queries x keys. */
function weightsOf({ heads, queries, keys, prefix }, levels, steps, largest, toPrefix) {
  const first = prefix.length;
  const weights = new Float32Array(heads * queries * keys);
  for (let row = 0; row < heads * queries; row++) {
    for (let k = 0; k < first; k++) weights[row * keys + k] = toPrefix[row * first + k];
    const scale = largest[row] / levels;
    for (let k = first; k < keys; k++) weights[row * keys + k] = steps[row * (keys - first) + k - first] * scale;
  }
  return weights;
}

function fill(id, options, chosen) {
  byId(id).replaceChildren(...options.map(([value, text]) => element("option", { value: String(value) }, text)));
  byId(id).value = String(chosen);
}

function prefixNames(layer) {
  const counts = new Map();
  const total = (name) => layer.prefix.filter((one) => one === name).length;
  return layer.prefix.map((name) => {
    counts.set(name, (counts.get(name) ?? 0) + 1);
    return total(name) > 1 ? `${name} token ${counts.get(name)}` : `${name} token`;
  });
}

/** Returns what has to be known of a layer's picture, or of all layers'. */
function notesOn(layers, levels) {
  const words = [`Values are kept in ${levels} steps of each row's largest: they are off by at most 1/${2 * levels} of it.`];
  const together = Math.max(...layers.map((layer) => layer.together));
  if (together > 1) words.push(`Of this layer's places about ${together} x ${together} neighbours are one cell: the mean of what they give, the sum of what they take.`);
  if (layers.some((layer) => layer.kind === "window")) words.push("Attention in windows is laid on the whole photo: a place attends to its window alone.");
  const missing = report.notes.filter((note) => note.startsWith("not shown"));
  return [...words, ...missing].join(" ");
}

/** Whether the product over all layers is defined: all of them kept, of the same tokens. */
function canRollOut() {
  const layers = explorer.layers.filter((layer) => layer.kind !== "latent");
  return explorer.photo.attention.full && layers.length > 1 && layers.every((layer) => layer.kind === "global" && layer.keys === layers[0].keys && layer.queries === layer.keys);
}

function chooseAsker() {
  if (byId("asker").value === "patch") explorer.pinned = true;
  byId("follow").checked = !explorer.pinned;
  drawAttention();
}

/** Returns the weights of the queries that ask, in one layer: [index, weight] pairs. */
function askersIn(layer, keys) {
  const asker = byId("asker").value;
  const grid = keys ? layer.grid : layer.queryGrid;
  const count = keys ? layer.keys : layer.queries;
  const first = layer.prefix.length;
  if (!grid) return Array.from({ length: count }, (_, index) => [index, 1 / count]); // latents
  if (asker[0] === "t" && Number(asker.slice(1)) < first) return [[Number(asker.slice(1)), 1]];
  if (asker === "patch") return [[first + cellAt(explorer.query, grid), 1]];
  const patches = count - first;
  return Array.from({ length: patches }, (_, index) => [first + index, 1 / patches]);
}

function cellAt({ u, v }, [rows, columns]) {
  const row = Math.min(Math.max(Math.floor(v * rows), 0), rows - 1);
  const column = Math.min(Math.max(Math.floor(u * columns), 0), columns - 1);
  return row * columns + column;
}

/** Returns what a head (all: -1) gives: weights over keys, for the queries that ask; or over queries, for a key. */
function attended(layer, head, direction) {
  const { heads, queries, keys, weights } = layer;
  const from = direction === "from";
  const out = new Float32Array(from ? queries : keys);
  const chosen = head < 0 ? Array.from({ length: heads }, (_, index) => index) : [head];
  for (const [index, weight] of askersIn(layer, from)) {
    const share = weight / chosen.length;
    for (const one of chosen) {
      if (from) {
        for (let q = 0; q < queries; q++) out[q] += weights[(one * queries + q) * keys + index] * share;
      } else {
        const start = (one * queries + index) * keys;
        for (let k = 0; k < keys; k++) out[k] += weights[start + k] * share;
      }
    }
  }
  return out;
}

/** Returns the heads' mean of a layer, (queries x keys), made once. */
function meanOf(layer) {
  if (!layer.mean) {
    const size = layer.queries * layer.keys;
    layer.mean = new Float32Array(size);
    for (let head = 0; head < layer.heads; head++) {
      for (let i = 0; i < size; i++) layer.mean[i] += layer.weights[head * size + i] / layer.heads;
    }
  }
  return layer.mean;
}

/** Returns the row of the product over layers of (mean attention + identity) / 2 that belongs to who asks. */
function rolledOut() {
  const layers = explorer.layers.filter((layer) => layer.kind === "global");
  let row = new Float32Array(layers[0].keys);
  for (const [index, weight] of askersIn(layers[layers.length - 1], false)) row[index] = weight;
  for (const layer of [...layers].reverse()) {
    const mean = meanOf(layer);
    const next = new Float32Array(row.length);
    for (let q = 0; q < row.length; q++) {
      if (!row[q]) continue;
      const half = row[q] / 2;
      next[q] += half;
      const start = q * row.length;
      for (let k = 0; k < row.length; k++) next[k] += half * mean[start + k];
    }
    row = next;
  }
  return row;
}

/** Returns the keys that are sinks for a head of a layer (all together: -1): prefix tokens, then cells of its grid. */
function sinksOf(layer, head) {
  return layer.sinks[head + 1] ?? [];
}

const drawAttention = counted(async () => {
  const { photo, layers } = explorer;
  if (!photo || !layers.length || byId("explorer").hidden) return;
  const rollout = byId("direction").value === "rollout";
  const layer = rollout ? layers.findLast((one) => one.kind === "global") : layers[Number(byId("layer").value)];
  const heads = [[-1, "mean of all"], ...Array.from({ length: layer.heads }, (_, index) => [index, String(index)])];
  const before = byId("head").value;
  if (byId("head").options.length !== heads.length) fill("head", heads, heads.some(([value]) => String(value) === before) ? before : -1);
  const head = Number(byId("head").value);
  const direction = byId("direction").value;
  byId("layer").disabled = rollout || layers.length < 2;
  byId("head").disabled = rollout;
  const whole = rollout ? rolledOut() : attended(layer, head, direction);
  const grid = direction === "from" ? layer.queryGrid : layer.grid;
  byId("attention-notes").textContent = notesOn(rollout ? layers : [layer], photo.attention.levels);
  if (!grid) {
    explorer.shown = null;
    for (const id of ["attention-tokens", "attention-scale", "attention-marks"]) byId(id).replaceChildren();
    byId("attention-words").textContent = "In this layer a latent asks, which lies nowhere: choose what it attends to.";
    drawHeads();
    await drawMap(byId("attention-canvas"), photo, null);
    return;
  }
  const first = direction === "from" && layer.kind === "latent" ? 0 : layer.prefix.length;
  const values = whole.subarray(first);
  const map = { values, grid, ...rangeOf(values) };
  const scale = { low: 0, high: Math.max(map.high, 1e-12), signed: false, flat: false };
  explorer.shown = { values, grid, layer, direction };
  const canvas = byId("attention-canvas");
  if (!(await drawMap(canvas, photo, gallery.bare ? null : map, { strength: 0.75, kind: "attention", smooth: false, scale }))) return;
  if (!gallery.bare) drawMarks(canvas, layer, head, direction);
  showScale(byId("attention-scale"), scale, "share of the attention; this view, 0 to its highest", "attention");
  byId("attention-words").textContent = wordsOn(values, grid, layer, direction);
  showTokens(whole, layer, scale, first, rollout ? [] : sinksOf(layer, head));
  drawHeads();
});

/** Shows what class and register tokens get, or give: they have no place on the photo. Pressed, one of them asks. */
function showTokens(whole, layer, scale, first, sinks) {
  const colours = coloursOf(scale, "attention");
  const asked = byId("asker").value;
  const buttons = prefixNames(layer).slice(0, first).map((name, index) => {
    const step = Math.round(Math.min(whole[index] / scale.high, 1) * 255) * 3;
    const patch = element("span", { className: sinks.includes(index) ? "swatch sink" : "swatch" });
    patch.style.background = `rgb(${colours.slice(step, step + 3).join(" ")})`;
    const button = element("button", { type: "button", "aria-pressed": String(asked === `t${index}`) }, patch, `${name} ${percent(whole[index])}`);
    button.addEventListener("click", () => {
      byId("asker").value = `t${index}`;
      drawAttention().then(() => byId("attention-tokens").children[index]?.focus());
    });
    return button;
  });
  byId("attention-tokens").replaceChildren(...buttons);
}

/** Returns the grid that the patch lies on which asks, or is asked about. */
function askedGrid(layer, direction) {
  return direction === "from" ? layer.grid : layer.queryGrid;
}

function whoAsks(layer, direction) {
  const asker = byId("asker").value;
  const grid = askedGrid(layer, direction);
  if (!grid) return "The latent that pools";
  if (asker === "mean" || (asker[0] === "t" && Number(asker.slice(1)) >= layer.prefix.length)) return "The mean of all patches";
  if (asker[0] === "t") return `The ${prefixNames(layer)[Number(asker.slice(1))]}`;
  const cell = cellAt(explorer.query, grid);
  return `The patch in row ${Math.floor(cell / grid[1])}, column ${cell % grid[1]}`;
}

function wordsOn(values, grid, layer, direction) {
  let most = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[most]) most = i;
  const place = `row ${Math.floor(most / grid[1])}, column ${most % grid[1]}`;
  if (direction === "from") return `${whoAsks(layer, direction)} receives most from the patch in ${place}: ${percent(values[most])} of what that gives.`;
  const verb = direction === "rollout" ? "draws on all layers: most on" : "attends most to";
  return `${whoAsks(layer, direction)} ${verb} the patch in ${place} (${percent(values[most])}).`;
}

/** Returns the point of the photo (0 to 1) that a point of the model's input comes from. */
function photoPoint([a, b, c, d, e, f], u, v) {
  const turned = a * e - b * d;
  return [(e * (u - c) - b * (v - f)) / turned, (a * (v - f) - d * (u - c)) / turned];
}

function inputPoint([a, b, c, d, e, f], s, t) {
  return { u: a * s + b * t + c, v: d * s + e * t + f };
}

function drawMarks(canvas, layer, head, direction) {
  const rollout = direction === "rollout";
  const asked = askedGrid(layer, direction);
  const context = canvas.getContext("2d");
  const box = (cell, [rows, columns], colour, dash) => {
    const row = Math.floor(cell / columns), column = cell % columns;
    const [s0, t0] = photoPoint(explorer.photo.place, column / columns, row / rows);
    const [s1, t1] = photoPoint(explorer.photo.place, (column + 1) / columns, (row + 1) / rows);
    const at = [Math.min(s0, s1) * canvas.width, Math.min(t0, t1) * canvas.height, Math.abs(s1 - s0) * canvas.width, Math.abs(t1 - t0) * canvas.height];
    context.setLineDash([]);
    context.lineWidth = 4;
    context.strokeStyle = "#000000";
    context.strokeRect(...at);
    context.setLineDash(dash);
    context.lineWidth = 2;
    context.strokeStyle = colour;
    context.strokeRect(...at);
  };
  const sinks = rollout ? [] : sinksOf(layer, head).filter((key) => key >= layer.prefix.length);
  sinks.forEach((key) => box(key - layer.prefix.length, layer.grid, "#ffb000", [3, 3]));
  if (byId("asker").value === "patch" && asked) box(cellAt(explorer.query, asked), asked, "#ffffff", []);
  const tokens = rollout ? [] : sinksOf(layer, head).filter((key) => key < layer.prefix.length);
  const words = [];
  const over = `over ${report.sinkTimes} times the even share`;
  if (sinks.length) words.push(sinks.length === 1 ? `One patch is a sink here (dashed): it takes ${over}.` : `${sinks.length} patches are sinks here (dashed): each takes ${over}.`);
  if (tokens.length) words.push(`Also sinks: ${tokens.map((key) => prefixNames(layer)[key]).join(", ")}.`);
  byId("attention-marks").textContent = words.join(" ");
}

function pointOf(event) {
  const canvas = byId("attention-canvas");
  const bounds = canvas.getBoundingClientRect();
  const point = inputPoint(explorer.photo.place, (event.clientX - bounds.left) / bounds.width, (event.clientY - bounds.top) / bounds.height);
  return point.u >= 0 && point.u < 1 && point.v >= 0 && point.v < 1 ? point : null;
}

function hovered(event) {
  if (!explorer.layers.length || event.pointerType === "touch") return;
  const point = pointOf(event);
  if (!point) return;
  if (!explorer.pinned) return ask(point);
  if (!explorer.shown) return;
  const { values, grid } = explorer.shown;
  const cell = cellAt(point, grid);
  const place = `row ${Math.floor(cell / grid[1])}, column ${cell % grid[1]}`;
  byId("attention-words").textContent = `Patch in ${place}: ${short(values[cell])} (${percent(values[cell])}). ${wordsOn(values, grid, explorer.shown.layer, explorer.shown.direction)}`;
}

function clicked(event) {
  const point = explorer.layers.length ? pointOf(event) : null;
  if (!point) return;
  explorer.pinned = true;
  byId("follow").checked = false;
  ask(point);
}

/** Asks for a patch, and draws only where it is another one. */
function ask(point) {
  const grid = pointedGrid();
  const same = byId("asker").value === "patch" && explorer.query && cellAt(explorer.query, grid) === cellAt(point, grid);
  explorer.query = point;
  byId("asker").value = "patch";
  return same ? undefined : drawAttention();
}

/** Returns the grid on which the pointer and the keys move. */
function pointedGrid() {
  const layer = explorer.layers[Number(byId("layer").value)];
  return askedGrid(layer, byId("direction").value) ?? layer.grid;
}

function movedByKey(event) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  if (!(event.key in steps) || !explorer.layers.length) return;
  event.preventDefault();
  event.stopPropagation();
  const [rows, columns] = pointedGrid();
  const [down, right] = steps[event.key];
  const move = (place, count, step) => Math.min(Math.max((Math.floor(place * count) + step + 0.5) / count, 0), 1 - 1e-6);
  explorer.pinned = true;
  byId("follow").checked = false;
  ask({ u: move(explorer.query.u, columns, right), v: move(explorer.query.v, rows, down) });
}

// ------------------------------------------------------------------------------------------------ heads

function buildHeads() {
  const place = byId("heads-grid");
  const most = Math.max(...explorer.layers.map((layer) => layer.heads));
  place.style.gridTemplateColumns = `max-content repeat(${most}, minmax(48px, 104px))`;
  explorer.cells = [];
  const parts = [element("span", {}, "layer"), ...Array.from({ length: most }, (_, head) => element("span", { className: "head" }, `head ${head}`))];
  explorer.layers.forEach((layer, index) => {
    parts.push(element("span", {}, explorer.layers.length > 1 ? String(index) : "last"));
    for (let head = 0; head < most; head++) {
      if (head >= layer.heads) {
        parts.push(element("span"));
        continue;
      }
      const canvas = element("canvas");
      const cell = element("button", { type: "button", "aria-label": `layer ${index}, head ${head}`, "aria-pressed": "false" }, canvas);
      cell.addEventListener("click", () => {
        byId("layer").value = String(index);
        if (byId("direction").value === "rollout") byId("direction").value = "to";
        fill("head", [[-1, "mean of all"], ...Array.from({ length: layer.heads }, (_, one) => [one, String(one)])], head);
        drawAttention();
      });
      explorer.cells.push({ layer, index, head, canvas, cell });
      parts.push(cell);
    }
  });
  place.replaceChildren(...parts);
  const bar = { low: 0, high: 1, signed: false, flat: false };
  showScale(byId("heads-scale"), bar, "of the highest in each picture: they show where, and not how much", "attention");
}

function drawHeads() {
  const direction = byId("direction").value === "from" ? "from" : "to";
  const chosen = byId("direction").value === "rollout" ? [-1, -1] : [Number(byId("layer").value), Number(byId("head").value)];
  for (const { layer, index, head, canvas, cell } of explorer.cells) {
    const grid = direction === "from" ? layer.queryGrid : layer.grid;
    cell.setAttribute("aria-pressed", String(index === chosen[0] && (head === chosen[1] || chosen[1] === -1)));
    canvas.hidden = !grid; // a latent gives, and nothing attends to it
    if (!grid) continue;
    const first = direction === "from" && layer.kind === "latent" ? 0 : layer.prefix.length;
    const values = attended(layer, head, direction).subarray(first);
    const { high } = rangeOf(values);
    drawCells(canvas, values, grid, { low: 0, high: Math.max(high, 1e-12), flat: false, signed: false }, "attention");
  }
}

// ------------------------------------------------------------------------------------------------ classes

const openClassMaps = counted(async (photo) => {
  const maps = photo.classMaps ?? [];
  byId("class-maps").hidden = maps.length < 2;
  if (maps.length < 2) return;
  const names = maps.map((map, index) => [index, className(map.class)]);
  fill("difference-a", names, 0);
  fill("difference-b", names, 1);
  const cards = maps.map((map) => {
    const share = photo.top.find(([index]) => index === map.class)?.[1];
    const words = `${className(map.class)}${share === undefined ? "" : ` ${percent(share)}`}${map.class === photo.truth ? ", true" : ""}`;
    return classCard(photo, words);
  });
  const difference = classCard(photo, "");
  difference.id = "difference-card";
  byId("class-cards").replaceChildren(...cards, difference);
  // One scale for all: what is brighter is more.
  const values = await Promise.all(maps.map(valuesOf));
  if (explorer.photo !== photo) return;
  const all = values.filter(Boolean);
  if (!all.length) return byId("class-scale").replaceChildren("The maps have values that are not numbers: nothing is drawn.");
  const scale = scaleOf({ low: Math.min(...all.map((map) => map.low)), high: Math.max(...all.map((map) => map.high)) });
  cards.forEach((card, index) => drawMap(card.querySelector("canvas"), photo, values[index], { scale }));
  showScale(byId("class-scale"), scale, "one scale for all classes, lowest to highest; the difference has its own");
  await drawDifference();
});

function classCard(photo, words) {
  const [width, height] = fitted(photo, 280, 240);
  const canvas = element("canvas", { width, height, role: "img", "aria-label": words });
  return element("div", { className: "card" }, canvas, element("div", { className: "text" }, words));
}

const drawDifference = counted(async () => {
  const { photo } = explorer;
  const pair = ["difference-a", "difference-b"].map((id) => photo.classMaps[Number(byId(id).value)]);
  const [one, other] = await Promise.all(pair.map(valuesOf));
  const card = byId("difference-card");
  if (!one || !other || explorer.photo !== photo) return;
  const values = one.values.map((value, index) => value - other.values[index]);
  const map = { values, grid: one.grid, ...rangeOf(values) };
  const most = Math.max(Math.abs(map.low), Math.abs(map.high));
  const words = `red: more for ${className(pair[0].class)}, blue: more for ${className(pair[1].class)} (to ${short(most)})`;
  const canvas = card.querySelector("canvas");
  canvas.setAttribute("aria-label", words);
  card.querySelector(".text").textContent = words;
  await drawMap(canvas, photo, map, { scale: { low: -most, high: most, signed: true, flat: most === 0 } });
});
