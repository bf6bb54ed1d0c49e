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
  for (const id of ["filter-class", "filter-right", "sort"]) {
    byId(id).addEventListener("change", () => {
      gallery.cell = null;
      showCards();
    });
  }
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("method").addEventListener("change", () => chooseMethod(Number(byId("method").value)));
  byId("strength").addEventListener("input", () => {
    gallery.strength = byId("strength").value / 100;
    byId("strength-value").textContent = `${byId("strength").value} %`;
    redrawCards();
  });
  showCards();
}

function chooseMethod(index) {
  gallery.method = index;
  byId("method").value = String(index);
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
  byId("count").textContent = `${gallery.shown.length} of ${total} photos${cell}${known ? `, ${wrong} wrong` : ""}`;
}

function cardOf(photo) {
  const canvas = element("canvas", { width: 1, height: 1, role: "img" });
  const right = isRight(photo);
  const text = element("div", { className: "text" }, element("div", { className: "name" }, photo.name), element("div", {}, answerText(photo)));
  if (photo.truth !== null) {
    const words = right ? "right" : `wrong: it is ${className(photo.truth)}`;
    text.append(element("div", { className: right ? "right" : "wrong" }, words));
  }
  const card = element("button", { type: "button", className: "card" }, canvas, text);
  card.photo = photo;
  const truth = photo.truth === null ? "" : right ? ", which is right" : `, but it is ${className(photo.truth)}`;
  canvas.setAttribute("aria-label", `${photo.name}: predicted ${answerText(photo)}${truth}; overlay by ${report.methods[gallery.method].name}`);
  card.addEventListener("click", () => openPhoto(photo));
  card.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "touch") showBare(true);
  });
  return card;
}

const drawCard = counted(async (card) => {
  const canvas = card.querySelector("canvas");
  const [width, height] = fitted(card.photo, 300, 240);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const map = gallery.bare ? null : await valuesOf(card.photo.maps[gallery.method]);
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
}

function moveFocus(step) {
  const cards = [...byId("cards").children];
  const at = cards.indexOf(document.activeElement);
  cards[Math.min(Math.max(at + step, 0), cards.length - 1)]?.focus();
}
