// What the attention blocks of a network let through: places as overlays, channels as bars.

function startBlocks() {
  const photos = report.photos.filter((photo) => photo.gates?.length);
  if (!photos.length) {
    const why = report.notes.filter((note) => note.startsWith("no gates")).join(" ");
    byId("blocks").replaceChildren(element("p", { className: "note" }, why || "No photo was explored: --explored N keeps the gates of some."));
    return;
  }
  const choice = byId("blocks-photo");
  photos.forEach((photo, index) => choice.append(element("option", { value: String(index) }, photo.name)));
  choice.addEventListener("change", () => showBlocks(photos[Number(choice.value)]));
  byId("tab-blocks").addEventListener("click", () => showBlocks(photos[Number(choice.value)]), { once: true });
}

function showBlocks(photo) {
  byId("blocks-list").replaceChildren(...photo.gates.map((gate) => blockOf(photo, gate)));
}

function blockOf(photo, gate) {
  const [width, height] = fitted(photo, 260, 240);
  const canvas = element("canvas", { width, height, role: "img", "aria-label": `${gate.name}: ${gate.what} on ${photo.name}` });
  const scale = element("div", { className: "scale" });
  valuesOf(gate.map).then((map) => {
    drawMap(canvas, photo, map);
    if (map) showScale(scale, scaleOf(map), `${gate.what}, lowest to highest`);
  });
  const beside = element("div");
  if (gate.gain !== null) {
    const turned = gate.turned ? `, turned round in ${percent(gate.turned)} of its channels` : "";
    beside.append(element("p", { className: "note" }, `The network lets ${short(gate.gain)} of this block in${turned}.`));
  }
  if (gate.channels) {
    gate.channels.forEach((row, path) => beside.append(barsOf(row, gate, path)));
  }
  if (gate.strongest.length) {
    const cards = gate.strongest.map(([number, value, packed]) => {
      const small = fitted(photo, 140, 120);
      const picture = element("canvas", { width: small[0], height: small[1], role: "img", "aria-label": `channel ${number} of ${gate.name}` });
      valuesOf(packed).then((map) => drawMap(picture, photo, map));
      return element("div", {}, picture, `channel ${number}: gate ${short(value)}`);
    });
    beside.append(element("h3", {}, "Strongest channels"), element("div", { className: "strongest" }, ...cards));
  }
  const picture = element("div", {}, canvas, scale);
  return element("article", { className: "panel" }, element("h2", {}, `${gate.name}: ${gate.what}`), element("div", { className: "blocks-row" }, picture, beside));
}

function barsOf(row, gate, path) {
  const canvas = element("canvas", { className: "bars", width: 900, height: 90, role: "img" });
  const { low, high } = rangeOf(row);
  const bottom = Math.min(low, 0), top = Math.max(high, 0);
  const name = gate.channels.length > 1 ? `path ${path}: ` : "";
  canvas.setAttribute("aria-label", `${name}gates of ${row.length} channels, ${short(low)} to ${short(high)}`);
  const context = canvas.getContext("2d");
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
  const at = (value) => 88 - ((value - bottom) / (top - bottom || 1)) * 86;
  row.forEach((value, index) => {
    const x = (index / row.length) * 900;
    context.fillRect(x, Math.min(at(value), at(0)), Math.max(900 / row.length - 0.5, 0.8), Math.max(Math.abs(at(value) - at(0)), 1));
  });
  return element("figure", { style: "margin:0" }, canvas, element("figcaption", { className: "note" }, `${name}gates of ${row.length} channels, ${short(low)} to ${short(high)}`));
}
