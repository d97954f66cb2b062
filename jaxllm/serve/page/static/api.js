// Requests to the server that this page came from: the key, errors in words, and streams of events.

const KEY = "jaxllm-api-key";

/** A response that is not a success; `status` is its code, the message what the server says. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function rememberKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** The response of a route, given relative to the page; throws an ApiError where it is no success. */
export async function request(path, { body, signal } = {}) {
  const key = sessionStorage.getItem(KEY);
  const response = await fetch(path, {
    method: body === undefined ? "GET" : "POST",
    headers: {
      ...(key === null ? {} : { Authorization: `Bearer ${key}` }),
      ...(body === undefined ? {} : { "Content-Type": "application/json" }),
    },
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
  });
  if (response.ok) return response;
  let message = `The server answers ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Something between us and the server has answered; its status has to do.
  }
  throw new ApiError(response.status, message);
}

/** The data of each server-sent event of a response, parsed, until [DONE] or its end. */
export async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + decoder.decode(value, { stream: true })).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue;
        const data = part.slice("data: ".length);
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
