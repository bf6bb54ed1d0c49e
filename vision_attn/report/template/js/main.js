// Tabs, theme, keys.

const TABS = ["gallery", "explorer", "blocks", "trust", "run"];

/** Shows a part of the page, with what was chosen elsewhere meanwhile, unless whoever asks draws that. */
function showTab(name, redraw = true) {
  for (const one of TABS) {
    const chosen = one === name;
    byId(one).hidden = !chosen;
    byId(`tab-${one}`).setAttribute("aria-selected", String(chosen));
    byId(`tab-${one}`).tabIndex = chosen ? 0 : -1;
  }
  if (name === "explorer" && redraw) {
    if (!explorer.photo) openPhoto(firstToExplore(), false);
    else Promise.all([drawMapPanel(), drawAttention()]);
  }
  if (name === "blocks") showBlocks();
}

/** Returns the first photo with all layers, else the first. */
function firstToExplore() {
  return report.photos.find((photo) => photo.attention?.full || photo.classMaps) ?? report.photos[0];
}

function stored(value) {
  try {
    if (value !== undefined) localStorage.setItem("vision-attn-theme", value);
    return localStorage.getItem("vision-attn-theme");
  } catch {
    return null; // a browser that keeps nothing for files
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", `Change to the ${theme === "dark" ? "light" : "dark"} theme`);
}

function typing(event) {
  return event.target.closest("select, input, textarea") !== null;
}

function startKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("[role=tab]") && ["ArrowLeft", "ArrowRight"].includes(event.key)) {
      const at = TABS.findIndex((name) => `tab-${name}` === event.target.id);
      const next = TABS[(at + (event.key === "ArrowRight" ? 1 : TABS.length - 1)) % TABS.length];
      showTab(next);
      byId(`tab-${next}`).focus();
      return;
    }
    if (typing(event)) return;
    const inGallery = !byId("gallery").hidden, inExplorer = !byId("explorer").hidden;
    if (event.key === " " && (inGallery || inExplorer) && !event.target.closest("button:not(.card)")) {
      event.preventDefault();
      showBare(true);
    } else if (event.key.toLowerCase() === "m" && report.methods.length > 1 && (inGallery || inExplorer)) {
      chooseMethod((gallery.method + 1) % report.methods.length);
      drawMapPanel();
    } else if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      const step = event.key === "ArrowRight" ? 1 : -1;
      if (inGallery) moveFocus(step);
      else if (inExplorer) stepPhoto(step);
    } else if (event.key === "Escape" && inExplorer) showTab("gallery");
  });
  document.addEventListener("keyup", (event) => {
    if (event.key !== " ") return;
    if (gallery.bare) event.preventDefault();
    showBare(false);
  });
  for (const end of ["pointerup", "pointercancel"]) document.addEventListener(end, () => showBare(false));
  window.addEventListener("blur", () => showBare(false));
}

document.title = report.title;
byId("title").textContent = report.title;
setTheme(stored() ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
byId("theme").addEventListener("click", () => {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  stored(theme);
  setTheme(theme);
  showBlocks(); // its bars are painted in the theme's colour
});
for (const name of TABS) byId(`tab-${name}`).addEventListener("click", () => showTab(name));
startGallery();
startExplorer();
startBlocks();
startTrust();
startRun();
startKeys();
document.documentElement.dataset.ready = "true";
