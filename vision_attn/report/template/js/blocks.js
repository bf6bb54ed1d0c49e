// What the attention blocks of a network let through: places as overlays, channels as bars.

function startBlocks() {
  const photos = photosWithGates();
  if (!photos.length) {
    const why = report.notes.filter((note) => note.startsWith("no gates")).join(" ");
    byId("blocks").replaceChildren(element("p", { className: "note" }, why || "No photo was explored: --explored N keeps the gates of some."));
    return;
  }
  const choice = byId("blocks-photo");
  photos.forEach((photo, index) => choice.append(element("option", { value: String(index) }, photo.name)));
  choice.addEventListener("change", showBlocks);
}

function photosWithGates() {
  return report.photos.filter((photo) => photo.gates?.length);
}

function showBlocks() {
  const photo = photosWithGates()[Number(byId("blocks-photo")?.value)];
  if (!photo || byId("blocks").hidden) return;
  const blocks = new Map(); // what one block multiplies with stands together
  for (const gate of photo.gates) {
    const name = gate.name.replace(/\.?report\w*(?=$| \()/, "");
    blocks.set(name, [...(blocks.get(name) ?? []), gate]);
  }
  byId("blocks-list").replaceChildren(...[...blocks].map(([name, gates]) => blockOf(photo, name || "the model", gates)));
}

function blockOf(photo, name, gates) {
  const gain = gates.find((gate) => gate.gain !== null);
  const turned = gain?.turned ? `, turned round in ${percent(gain.turned)} of its channels` : "";
  const words = gain ? [element("p", { className: "note" }, `The network lets ${short(gain.gain)} of this block in${turned}.`)] : [];
  return element("article", { className: "panel" }, element("h2", {}, name), ...words, element("div", { className: "gates" }, ...gates.map((gate) => gateOf(photo, gate))));
}

function gateOf(photo, gate) {
  const [width, height] = fitted(photo, 260, 240);
  const canvas = element("canvas", { width, height, role: "img", "aria-label": `${gate.name}: ${gate.what} on ${photo.name}` });
  const scale = element("div", { className: "scale" });
  valuesOf(gate.map).then((map) => {
    drawMap(canvas, photo, map);
    if (!map) scale.textContent = "values that are not numbers: nothing is drawn";
    else showScale(scale, scaleOf(map), "this map, lowest to highest");
  });
  const beside = element("div");
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
    beside.append(element("h4", {}, "Strongest channels"), element("div", { className: "strongest" }, ...cards));
  }
  const picture = element("div", {}, canvas, scale);
  const row = element("div", { className: "blocks-row" }, picture, ...(beside.childNodes.length ? [beside] : []));
  return element("section", { className: beside.childNodes.length ? "gate wide" : "gate" }, element("h3", {}, gate.what), row);
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
