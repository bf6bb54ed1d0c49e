// Photos with what was predicted and where the model looked; filters, sorting, keys.

const gallery = { bare: false, method: 0, strength: 0.6, shown: [], cell: null };

function startGallery() {
  const classes = byId("filter-class");
  classes.append(element("option", { value: "" }, "all"));
  const seen = new Set(report.photos.flatMap((photo) => [photo.truth, prediction(photo)]).filter((index) => index !== null));
  for (const index of [...seen].sort((one, other) => one - other)) {
    classes.append(element("option", { value: String(index) }, className(index)));
  }
  const truth = report.photos.some((photo) => photo.truth !== null);
  byId("filter-right").disabled = !truth;
  if (!truth) byId("sort").querySelector("[value=mistakes]").remove();
  report.methods.forEach((method, index) => byId("method").append(element("option", { value: String(index) }, method.name)));
  byId("method").disabled = report.methods.length < 2;
  for (const id of ["filter-class", "filter-right"]) {
    byId(id).addEventListener("change", () => {
      gallery.cell = null;
      showCards();
    });
  }
  byId("sort").addEventListener("change", showCards);
  byId("all-photos").addEventListener("click", () => {
    for (const id of ["filter-class", "filter-right"]) byId(id).value = "";
    gallery.cell = null;
    showCards();
    byId("filter-class").focus();
  });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("method").addEventListener("change", () => chooseMethod(Number(byId("method").value)));
  byId("strength").addEventListener("input", () => {
    gallery.strength = byId("strength").value / 100;
    byId("strength-value").textContent = `${byId("strength").value} %`;
    redrawCards();
  });
  showGalleryScale();
  showCards();
}

function chooseMethod(index) {
  gallery.method = index;
  byId("method").value = String(index);
  if (explorer.photo) byId("map-choice").value = `m${index}`;
  for (const card of byId("cards").children) tellCard(card);
  showGalleryScale();
  redrawCards();
}

/** Returns the photos that the filters leave, in the order that is asked for. */
function chosenPhotos() {
  const wanted = byId("filter-class").value;
  const right = byId("filter-right").value;
  let photos = report.photos.filter((photo) => {
    if (gallery.cell) return photo.truth === gallery.cell[0] && prediction(photo) === gallery.cell[1];
    if (wanted !== "" && photo.truth !== Number(wanted) && prediction(photo) !== Number(wanted)) return false;
    return right === "" || isRight(photo) === (right === "right");
  });
  const sure = (photo) => probability(photo) ?? 0;
  const worst = (photo) => (isRight(photo) === false ? sure(photo) : isRight(photo) === null ? -1 : -1 - sure(photo));
  const orders = { mistakes: worst, sure, unsure: (photo) => -sure(photo) };
  const order = orders[byId("sort").value];
  if (order) photos = [...photos].sort((one, other) => order(other) - order(one));
  return photos;
}

const cardsInView = new Set();
const cardWatch = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        cardsInView.add(entry.target);
        drawCard(entry.target);
      } else cardsInView.delete(entry.target);
    }
  },
  { rootMargin: "300px" },
);

function showCards() {
  gallery.shown = chosenPhotos();
  cardWatch.disconnect();
  cardsInView.clear();
  const cards = gallery.shown.map(cardOf);
  byId("cards").replaceChildren(...cards);
  cards.forEach((card) => cardWatch.observe(card));
  const total = report.photos.length;
  const wrong = gallery.shown.filter((photo) => isRight(photo) === false).length;
  const known = gallery.shown.some((photo) => photo.truth !== null);
  const cell = gallery.cell ? ` (${className(gallery.cell[0])} taken for ${className(gallery.cell[1])})` : "";
  byId("all-photos").hidden = gallery.shown.length === total;
  byId("count").textContent = `${gallery.shown.length} of ${total} photos${cell}${known ? `, ${wrong} wrong` : ""}`;
}

function cardOf(photo) {
  const canvas = element("canvas", { width: 1, height: 1, role: "img" });
  const right = isRight(photo);
  const text = element("div", { className: "text" }, element("div", { className: "name" }, photo.name), element("div", {}, answerText(photo)));
  if (photo.attention?.full || photo.classMaps) text.append(element("div", { className: "name" }, photo.attention?.full ? "explored: all layers" : "explored: likeliest classes"));
  if (photo.truth !== null) {
    const words = right ? "right" : `wrong: it is ${className(photo.truth)}`;
    text.append(element("div", { className: right ? "right" : "wrong" }, words));
  }
  const card = element("button", { type: "button", className: "card" }, canvas, text);
  card.photo = photo;
  text.append(element("div", { className: "name broken", hidden: true }, "no map: its values are not numbers"));
  tellCard(card);
  let held = 0; // since when a finger is on it: one that stays looks at the bare photo, one that does not opens it
  card.addEventListener("pointerdown", (event) => {
    held = event.pointerType === "touch" ? event.timeStamp : 0;
    if (held) showBare(true);
  });
  card.addEventListener("contextmenu", (event) => held && event.preventDefault());
  card.addEventListener("click", (event) => {
    if (!held || event.timeStamp - held < 400) openPhoto(photo);
    held = 0;
  });
  return card;
}

/** Says what a card shows: who is on it, and by what method. */
function tellCard(card) {
  const { photo } = card;
  const truth = photo.truth === null ? "" : isRight(photo) ? ", which is right" : `, but it is ${className(photo.truth)}`;
  const words = `${photo.name}: predicted ${answerText(photo)}${truth}; overlay by ${report.methods[gallery.method].name}`;
  card.querySelector("canvas").setAttribute("aria-label", words);
  card.querySelector(".broken").hidden = !photo.maps[gallery.method].broken;
}

/** The bar of the gallery: each photo has a scale of its own, in one set of colours where no map has both signs. */
function showGalleryScale() {
  const maps = report.photos.map((photo) => photo.maps[gallery.method]).filter((map) => !map.broken);
  const signed = maps.some((map) => map.low < 0 && map.high > 0);
  const bar = { low: signed ? -1 : 0, high: 1, signed, flat: false };
  const ends = signed ? ["-", "+"] : ["lowest", "highest"];
  showScale(byId("gallery-scale"), bar, `of each map by ${report.methods[gallery.method].name}, which has a scale of its own`, "heat", ends);
}

const drawCard = counted(async (card) => {
  const canvas = card.querySelector("canvas");
  const [width, height] = fitted(card.photo, 300, 240);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const map = gallery.bare ? null : valuesOf(card.photo.maps[gallery.method]);
  await drawMap(canvas, card.photo, map, { strength: gallery.strength });
});

function redrawCards() {
  cardsInView.forEach(drawCard);
}

function showBare(bare) {
  if (gallery.bare === bare) return;
  gallery.bare = bare;
  redrawCards();
  drawMapPanel();
  drawAttention();
}

function moveFocus(step) {
  const cards = [...byId("cards").children];
  const at = cards.indexOf(document.activeElement);
  cards[Math.min(Math.max(at + step, 0), cards.length - 1)]?.focus();
}
