// Server-sent events over fetch: unlike EventSource it can POST and send a key. See frontend/sse.py for the other end.

import { authorization, askForKey } from "./key.js";

/** Thrown when the server answers with anything but 200; the message is the server's own. */
export class ServerError extends Error {}

/** fetch with the API key, asking for one when the server wants it. */
export async function request(path, options = {}) {
  for (;;) {
    const response = await fetch(path, { ...options, headers: { ...options.headers, ...authorization() } });
    if (response.ok) return response;
    if (response.status === 401) {
      await askForKey();
      continue;
    }
    const body = await response.json().catch(() => null);
    throw new ServerError(body?.error?.message ?? `the server answered ${response.status}`);
  }
}

/** Yields the parsed JSON of each event up to [DONE] or the end of the stream. */
export async function* events(path, options) {
  const response = await request(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (unread + value).split("\n\n");
    unread = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue; // a comment that shows that the server is alive
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice(6));
    }
  }
}
