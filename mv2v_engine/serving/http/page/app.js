// The page: what the address names is shown; the theme, the token and the model around it.

import * as api from "./api.js";
import { pathOf } from "./camera.js";
import { $, h, replace, setIcon } from "./dom.js";
import { plural } from "./format.js";
import { Preview } from "./frustum.js";
import { announce, problem } from "./notices.js";
import { SessionList, Uploader } from "./sessions.js";
import { keepFocus, setUpShortcuts } from "./shortcuts.js";
import { Workspace } from "./workspace.js";

const THEMES = { auto: "system", light: "light", dark: "dark" };

let workspace = null;
let list = null;
let uploader = null;
let shows = 0;
let hero = null; // drawn once it is shown
let fresh = null; // the session that this page has just made

/** What the address names: #session=…&show=2&beside=source&mode=side&frame=8 */
function readHash() {
  const said = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  return { ...said, frame: Number(said.frame) || 0 };
}

function hashOf(session, view) {
  const said = Object.entries(view).filter(([, value]) => value && value !== "wipe");
  return `#${new URLSearchParams({ session, ...Object.fromEntries(said) })}`;
}

/** Shows the place of a session, or the welcome. */
function reveal(session) {
  document.documentElement.dataset.view = session ? "session" : "";
  // behind the first frame, in which the words are
  if (!session) hero ??= requestAnimationFrame(() => setTimeout(drawHero));
}

/** A later call overtakes one that still waits for the service. known: what the address names. */
async function show(known) {
  if (!workspace) return;
  const { session, ...view } = readHash();
  if (session && workspace.session?.id === session) return;
  const number = (shows += 1);
  reveal(session);
  list.mark(session);
  replace($("page-state"));
  if (!session) {
    document.title = "mv2v";
    workspace.close();
    return;
  }
  try {
    await workspace.open(session, view, known);
    if (number !== shows) return;
    document.title = `${workspace.session.name || "Untitled"} – mv2v`;
    // whoever came here by what is gone now goes on where the next turn is asked for
    const { activeElement: active } = document;
    if (active === document.body || !active.checkVisibility() || session === fresh) {
      // on a phone the keyboard would cover the picture
      if (matchMedia("(pointer: coarse)").matches) $("viewer").focus({ preventScroll: true });
      else workspace.composer.focus();
    }
    fresh = null;
  } catch (error) {
    if (number !== shows) return;
    reveal(null);
    if (error.status !== 404) problem($("page-state"), error, () => show());
    else {
      problem($("page-state"), new Error("This video is not here: it may have been deleted. "
        + "Choose another one, or drop it again."));
    }
  }
}

/** The room as one will meet it: the source's camera, and three that were asked for. */
function drawHero() {
  const path = (camera) => pathOf(camera, new Map());
  const others = ["arc:55", "crane:2.2"].map((camera, index) =>
    ({ poses: path(camera), label: String(index + 1) }));
  hero = new Preview($("hero"));
  hero.view = { yaw: 24, pitch: 30 };
  hero.show({
    path: path("arc:-70"), others, aspect: 0.6,
    words: "A camera before a subject, and three paths that other cameras take around it",
  });
}

function goTo(session) {
  location.hash = session ? `session=${session.id}` : "";
}

function confirmed({ title, words, yes }) {
  const dialog = $("confirm");
  $("confirm-title").textContent = title;
  $("confirm-words").textContent = words;
  $("confirm-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

async function deleteSession(session) {
  const isSure = await confirmed({
    title: `Delete ${session.name || "this session"}?`,
    words: `The video and ${plural(session.num_turns, "turn")} are removed from the service. `
      + "Branches of it stay.",
    yes: "Delete it",
  });
  if (!isSure) return;
  await api.remove(session.id);
  announce("The session is deleted");
  // it may have taken a step of the turn under way, and the user somewhere else meanwhile
  if (readHash().session === session.id) goTo(null);
  $("main").focus({ preventScroll: true });
  list.refresh();
}

function setUpTheme() {
  const button = $("theme");
  const order = Object.keys(THEMES);
  const showTheme = () => {
    const theme = document.documentElement.dataset.theme ?? "auto";
    setIcon(button, theme);
    button.ariaLabel = `Theme: ${THEMES[theme]}. Change it`;
    button.title = `Theme: ${THEMES[theme]}`;
    document.dispatchEvent(new Event("theme"));
    return theme;
  };
  button.addEventListener("click", () => {
    const next = order[(order.indexOf(showTheme()) + 1) % order.length];
    if (next === "auto") {
      delete document.documentElement.dataset.theme;
      localStorage.removeItem("mv2v-theme");
    } else {
      document.documentElement.dataset.theme = next;
      localStorage.setItem("mv2v-theme", next);
    }
    showTheme();
  });
  showTheme();
}

function setUpAccess() {
  const dialog = $("access");
  $("access-open").addEventListener("click", askForToken);
  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "yes") return;
    api.setToken($("token").value.trim());
    location.reload();
  });
}

function askForToken() {
  $("token").value = api.getToken();
  $("access").returnValue = "no";
  $("access").showModal();
}

/**
 * The model, once it is loaded, which takes a service that has just started a while, and beside it
 * the session that the address names; what is wrong with that is said where it is shown.
 */
async function load() {
  const place = $("page-state");
  for (;;) {
    try {
      const { session } = readHash();
      const found = await Promise.all([
        api.model(), session && api.whole(session).catch(() => null), window.begun?.stands]);
      replace(place);
      return found;
    } catch (error) {
      if (error.status === 401) askForToken();
      if (error.code !== "not_ready") throw error;
      replace(place, h("div", { class: "note", role: "status" }, error.message),
        h("progress", { "aria-label": "Loading the model" }));
      await new Promise((resolve) => { setTimeout(resolve, 1000 * (error.retryAfter ?? 2)); });
    }
  }
}

function setUpKeys() {
  $("skip").addEventListener("click", (event) => {
    event.preventDefault(); // the hash is the view's
    $("main").focus();
  });
  setUpShortcuts(() => workspace);
  keepFocus(() => [workspace?.session && $("viewer"), $("main")]);
}

async function start() {
  let model, known;
  try {
    [model, known] = await load();
  } catch (error) {
    problem($("page-state"), error, start);
    return;
  }
  $("model").textContent = `${model.id} · ${model.engine.device}`;
  if (model.kind === "streams") {
    $("welcome").hidden = $("side").hidden = $("keys-open").hidden = true;
    $("streams").hidden = false;
    $("shell").classList.add("alone");
    const { Live } = await import("./live.js");
    new Live(model, confirmed);
    return;
  }
  if (model.kind === "edits") {
    $("welcome").querySelector("h1").textContent = "Change a video, turn by turn.";
    $("welcome-words").textContent = "Drop a video, say what to change, and change it again: "
      + "each part remembers what came before.";
  }
  uploader.setModel(model);
  workspace = new Workspace(model, {
    onview: () =>
      history.replaceState(null, "", hashOf(workspace.session.id, workspace.view)),
    confirmed,
    onbranch: async (session) => {
      await list.refresh();
      announce("Branched into a new session");
      fresh = session.id;
      goTo(session);
    },
    onchange: () => list.refresh(),
    ondelete: deleteSession,
  });
  show(known); // its picture before the list
  list.refresh();
}

list = new SessionList();
reveal(readHash().session);
uploader = new Uploader((session) => {
  fresh = session.id;
  goTo(session);
  list.refresh();
});
setUpTheme();
setUpAccess();
setUpKeys();
window.addEventListener("hashchange", () => show());
for (const type of ["focus", "online"]) {
  window.addEventListener(type, () => {
    workspace?.refresh();
    list.refresh();
  });
}
$("home").addEventListener("click", () => goTo(null));
start();
