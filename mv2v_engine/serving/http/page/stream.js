// Server-sent events through fetch, because EventSource cannot send the Authorization header.

import { ServiceError, send } from "./api.js";

const SILENCE = 45_000; // ms; the server sends a comment every 15 s
const LONGEST_WAIT = 10_000; // ms between two attempts

/** The events of a response: {id, data}, data in one line, as the service writes it. */
async function* parsed(body, onbytes) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    onbytes();
    const events = (rest + value).split(/\r\n\r\n|\n\n/);
    rest = events.pop();
    for (const event of events) {
      const fields = event.split(/\r?\n/).map((line) => line.split(/: ?(.*)/));
      const { id, data } = Object.fromEntries(fields);
      if (data) yield { id, data };
    }
  }
}

/** Until a time is over, the browser is online again, or `signal` ends it. */
function pause(milliseconds, signal) {
  const over = AbortSignal.any([signal, AbortSignal.timeout(milliseconds)]);
  return new Promise((resolve) => {
    over.addEventListener("abort", resolve, { once: true });
    window.addEventListener("online", resolve, { once: true, signal: over });
  });
}

/**
 * Follows a stream until `onevent` returns true, and takes it up again wherever it breaks.
 *
 * onevent: (data), parsed from JSON. onlink: (whether it is connected).
 * signal: ends it in silence. Throws a ServiceError that another attempt would only repeat.
 */
export async function follow(path, { onevent, onlink, signal }) {
  let last = null;
  let failures = 0;
  while (!signal.aborted) {
    const attempt = new AbortController();
    let silence;
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => attempt.abort(), SILENCE);
    };
    heard();
    try {
      const headers = { Accept: "text/event-stream" };
      if (last !== null) headers["Last-Event-ID"] = last;
      const response = await send(path, {
        headers, signal: AbortSignal.any([signal, attempt.signal]),
      });
      onlink(true);
      for await (const event of parsed(response.body, heard)) {
        if (signal.aborted) return;
        failures = 0;
        last = event.id ?? last;
        if (onevent(JSON.parse(event.data))) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      const isLasting = error instanceof ServiceError && error.status >= 400
        && error.status < 500 && error.status !== 429;
      // a broken connection is a TypeError or an AbortError of the attempt
      const isLink = error instanceof ServiceError || error instanceof TypeError
        || error.name === "AbortError";
      if (isLasting || !isLink) throw error;
    } finally {
      clearTimeout(silence);
      attempt.abort();
    }
    if (signal.aborted) return;
    onlink(false);
    await pause(Math.min(LONGEST_WAIT, 500 * 2 ** failures), signal);
    failures += 1;
  }
}
