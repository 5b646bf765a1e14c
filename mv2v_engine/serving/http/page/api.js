// The service's HTTP interface. The token goes into a header alone, never into an address.

export const ROOT = new URL("../", import.meta.url);
const TOKEN = "mv2v-token";

/** An error with the server's own words. retryAfter: seconds, or null. */
export class ServiceError extends Error {
  constructor(status, code, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

const UNREACHABLE = "The service does not answer. Is it running, and is this machine online?";

export function getToken() {
  return sessionStorage.getItem(TOKEN) ?? "";
}

export function setToken(token) {
  if (token) sessionStorage.setItem(TOKEN, token);
  else sessionStorage.removeItem(TOKEN);
}

export const hex = (bytes) =>
  Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

/** A key under which a request may be sent again without being done twice. */
export function newKey() {
  return hex(crypto.getRandomValues(new Uint8Array(16)));
}

function authorized(headers = {}) {
  const token = getToken();
  return token ? { ...headers, Authorization: `Bearer ${token}` } : headers;
}

function serviceError(status, statusText, body, retryAfter) {
  let error = {};
  try {
    error = JSON.parse(body).error ?? {};
  } catch {
    // no JSON: a proxy's page, of which the status is all that one can show
  }
  const message = error.message ?? `The service answered ${status} ${statusText}`.trim() + ".";
  return new ServiceError(status, error.code ?? "", message, Number(retryAfter) || null);
}

/** What first.js has asked for, the first time that it is wanted; else undefined. */
function begun(address) {
  const answer = window.begun?.[address];
  if (answer) delete window.begun[address];
  return answer;
}

/** The element in which first.js shows the picture of a path; else undefined. */
export function begunPicture(path) {
  const picture = window.begun?.picture;
  return picture?.dataset.path === path ? picture : undefined;
}

/** Any request; its response if it is a good one. */
export async function send(path, { method = "GET", headers, body, signal } = {}) {
  const address = new URL(path, ROOT).href;
  let response;
  try {
    response = await ((method === "GET" && begun(address)) || fetch(address, {
      method, body, signal, headers: authorized(headers), cache: "no-store",
    }));
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(0, "", UNREACHABLE);
  }
  if (response.ok) return response;
  throw serviceError(response.status, response.statusText, await response.text(),
    response.headers.get("Retry-After"));
}

export async function json(path, options) {
  return (await send(path, options)).json();
}

export function post(path, content, key = null, method = "POST") {
  const headers = { "Content-Type": "application/json" };
  if (key) headers["Idempotency-Key"] = key;
  return json(path, { method, headers, body: JSON.stringify(content) });
}

/** All pages of a list. */
async function all(path) {
  const items = [];
  const address = new URL(path, ROOT);
  for (;;) {
    const page = await json(address);
    items.push(...page.data);
    if (!page.has_more || !page.data.length) return items;
    address.searchParams.set("after", page.data.at(-1).id);
  }
}

/** The model that this service runs, its sampling's fields beside its own. */
export async function model() {
  const found = (await json("v1/models")).data[0];
  return { ...found, ...found.sampling };
}

export const sessions = () => all("v1/sessions?limit=100");
export const session = (id) => json(`v1/sessions/${id}`);
export const turns = (id) => all(`v1/sessions/${id}/turns`);
export const turn = (id, number) => json(`v1/sessions/${id}/turns/${number}`);
export const jobs = (id) => all(`v1/jobs?session=${id}&limit=100`);
/** A session as it is now: itself, its turns, and its jobs in order. */
export async function whole(id) {
  const ask = () => Promise.all([session(id), turns(id)]);
  let [asked, [itself, made]] = await Promise.all([jobs(id), ask()]);
  // of one that ended meanwhile, the turn may not be among those that were asked for before
  const isThere = ({ state, number }) =>
    state !== "finished" || made.some((turn) => turn.number === number);
  if (!asked.every(isThere)) [itself, made] = await ask();
  return { session: itself, turns: made, jobs: asked.reverse() };
}

export const job = (id) => json(`v1/jobs/${id}`);
export const cancel = (id) => post(`v1/jobs/${id}/cancel`, {});
export const submit = (id, request, key) =>
  post(`v1/sessions/${id}/turns`, { ...request, previews: true }, key);
/** window: another part of the video, with turn 0 alone. */
export const branch = (id, turn, window = undefined) =>
  post(`v1/sessions/${id}/branches`, { turn, window });
export const editSession = (id, changes) => post(`v1/sessions/${id}`, changes, null, "PATCH");
export const editTurn = (id, turn, changes) =>
  post(`v1/sessions/${id}/turns/${turn}`, changes, null, "PATCH");
export const removeTurn = (id, turn) =>
  json(`v1/sessions/${id}/turns/${turn}`, { method: "DELETE" });
export const remove = (id) => send(`v1/sessions/${id}`, { method: "DELETE" });

export const eventsPath = (id) => `v1/jobs/${id}/events`;
export const sourcePath = (id) => `v1/sessions/${id}/source`;
export const exportPath = (id) => `v1/sessions/${id}/export`;
export const videoPath = (id, turn) => `v1/sessions/${id}/turns/${turn}/video`;
export const thumbnailPath = (id, turn) => `v1/sessions/${id}/turns/${turn}/thumbnail`;

/** A file as an object URL: an address of its own could not carry the token. */
export async function fetchFile(path, signal) {
  return URL.createObjectURL(await (await send(path, { signal })).blob());
}

/** Saves a file under a name. */
export async function download(path, name) {
  const address = await fetchFile(path);
  const link = Object.assign(document.createElement("a"), { href: address, download: name });
  link.click();
  // the browser has taken the file over once this task is done
  setTimeout(() => URL.revokeObjectURL(address), 0);
}

/**
 * A session of a video. fetch says nothing of how much it has sent, so this is the older interface.
 * choices: [field, text or file] beside it. onprogress: (share of the bytes that were sent). signal: aborts it.
 */
export function upload(file, { key, choices, onprogress, signal }) {
  const form = new FormData();
  for (const [name, value] of choices) form.append(name, value);
  form.append("name", file.name);
  form.append("video", file, file.name);
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", new URL("v1/sessions", ROOT));
    for (const [name, value] of Object.entries(authorized({ "Idempotency-Key": key }))) {
      request.setRequestHeader(name, value);
    }
    request.upload.onprogress = (event) => onprogress(event.loaded / (event.total || 1));
    request.onerror = () => reject(new ServiceError(0, "", UNREACHABLE));
    request.onabort = () => reject(new DOMException("the upload was stopped", "AbortError"));
    request.onload = () => {
      if (request.status < 300) resolve(JSON.parse(request.responseText));
      else {
        reject(serviceError(request.status, request.statusText, request.responseText,
          request.getResponseHeader("Retry-After")));
      }
    };
    signal.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}
