// What the page was given: the report's data, and blobs that are unpacked when they are asked for.

const report = JSON.parse(document.getElementById("report-data").textContent);
const unpacked = new Map();
const pictures = new Map();

function byId(id) {
  return document.getElementById(id);
}

/** Returns a new element with properties, attributes and children; strings become text, never markup. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function bytesOf(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

/** Returns a promise of a blob's bytes. */
function blob(number) {
  if (!unpacked.has(number)) {
    const source = byId(`blob-${number}`);
    const bytes = bytesOf(source.textContent);
    const whole = "deflated" in source.dataset ? inflated(bytes) : Promise.resolve(bytes);
    unpacked.set(number, whole);
  }
  return unpacked.get(number);
}

async function inflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Returns a promise of a photo's picture, decoded. */
function pictureOf(photo) {
  if (!pictures.has(photo)) {
    const image = new Image();
    image.src = `data:image/jpeg;base64,${byId(`blob-${photo.photo}`).textContent}`;
    pictures.set(photo, image.decode().then(() => image));
  }
  return pictures.get(photo);
}

/** Returns a promise of a map's values, from its lowest to its highest: {values, grid, low, high}. */
async function valuesOf(map) {
  if (map.broken) return null;
  if (!map.values) {
    const steps = await blob(map.blob);
    const values = new Float32Array(steps.length);
    for (let i = 0; i < steps.length; i++) values[i] = map.low + (steps[i] / 255) * (map.high - map.low);
    map.values = values;
  }
  return { values: map.values, grid: map.grid, low: map.low, high: map.high };
}

function className(index) {
  if (index === null || index === undefined) return "";
  return report.model.classes[index] ?? `class ${index}`;
}

function percent(share) {
  const value = share * 100;
  return `${value >= 10 || value === 0 ? Math.round(value) : value.toFixed(1)} %`;
}

function short(value, digits = 3) {
  if (value === null || value === undefined) return "-";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 0.001 && size < 10000 ? String(Number(value.toPrecision(digits))) : value.toExponential(digits - 2);
}

/** Returns both ends of a range, with as many digits as tell them apart. */
function endsOf(low, high) {
  for (let digits = 3; digits < 7; digits++) {
    const ends = [short(low, digits), short(high, digits)];
    if (ends[0] !== ends[1]) return ends;
  }
  return [short(low), short(high)];
}

function prediction(photo) {
  return photo.top.length ? photo.top[0][0] : null;
}

function probability(photo) {
  return photo.top.length ? photo.top[0][1] : null;
}

function isRight(photo) {
  return photo.truth === null || !photo.top.length ? null : photo.truth === prediction(photo);
}

function answerText(photo) {
  return photo.top.length ? `${className(prediction(photo))} ${percent(probability(photo))}` : "no classes";
}
