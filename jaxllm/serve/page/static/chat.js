// The chat: a conversation that is kept in this page alone, streamed from /v1/chat/completions.

import { events, request } from "./api.js";
import { byId, element } from "./dom.js";
import { render } from "./markdown.js";
import { explain, scale, tokenElement } from "./tokens.js";

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const NUM_ALTERNATIVES = 5;

/** Make the chat work. `model()` is the name to ask for; `onError` hears of every ApiError. */
export function startChat(model, onError) {
  const [messages, composer, prompt] = [byId("messages"), byId("composer"), byId("prompt")];
  const conversation = [];
  let running = null;

  const setRunning = (controller) => {
    running = controller;
    byId("send").hidden = running !== null;
    byId("stop-button").hidden = running === null;
    byId("clear").disabled = running !== null || conversation.length === 0;
  };

  async function send() {
    const content = prompt.value.trim();
    if (!content || running) return;
    let body;
    try {
      body = readSettings();
    } catch (error) {
      byId("settings").open = true;
      byId(error.field).focus();
      byId(error.field).reportValidity();
      return;
    }
    byId("welcome").hidden = true;
    prompt.value = "";
    conversation.push({ role: "user", content });
    messages.append(element("div", "message user", element("div", "content", content)));
    const answer = new Answer(messages);
    setRunning(new AbortController());
    const system = byId("system").value.trim();
    body.messages = [...(system ? [{ role: "system", content: system }] : []), ...conversation];
    body.model = model();
    try {
      const response = await request("v1/chat/completions", { body, signal: running.signal });
      for await (const chunk of events(response)) answer.take(chunk);
      answer.end();
    } catch (error) {
      if (error.name === "AbortError") answer.end("stopped by you");
      else {
        answer.fail(error.message);
        onError(error);
      }
    }
    if (answer.text) conversation.push({ role: "assistant", content: answer.text });
    else {
      // What was not answered is not part of the conversation, and can be sent again.
      conversation.pop();
      if (!prompt.value) prompt.value = content;
    }
    setRunning(null);
    prompt.focus();
  }

  composer.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  byId("stop-button").addEventListener("click", () => running?.abort());
  byId("clear").addEventListener("click", () => {
    conversation.length = 0;
    messages.replaceChildren(byId("welcome"));
    byId("welcome").hidden = false;
    setRunning(null);
    prompt.focus();
  });
  byId("settings").addEventListener("input", summarize);
  explain(messages);
}

/** The fields of a request that the settings ask for; what is left empty is the server's to choose. */
function readSettings() {
  const body = { stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) {
    const input = byId(name);
    if (!input.checkValidity()) throw Object.assign(new Error("invalid"), { field: name });
    if (input.value !== "") body[name] = Number(input.value);
  }
  const stop = byId("stop").value.split("\n").filter((line) => line !== "");
  if (stop.length) body.stop = stop;
  if (byId("logprobs").checked) Object.assign(body, { logprobs: true, top_logprobs: NUM_ALTERNATIVES });
  return body;
}

function summarize() {
  const set = NUMBERS.filter((name) => byId(name).value !== "").map((name) => `${name} ${byId(name).value}`);
  if (byId("stop").value) set.push("stop");
  if (byId("system").value.trim()) set.push("system prompt");
  byId("settings-summary").textContent = set.join(" · ");
}

/** A message of the model as it grows. */
class Answer {
  constructor(messages) {
    this.messages = messages;
    this.text = "";
    this.began = performance.now();
    this.content = element("div", "content waiting");
    this.meta = element("div", "meta");
    this.message = element("div", "message model-message", this.content, this.meta);
    messages.append(this.message);
    this.follow(true);
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices[0];
    if (!choice) return;
    const atEnd = this.isAtEnd();
    this.reason = choice.finish_reason ?? this.reason;
    const { content, reasoning_content: reasoning } = choice.delta;
    if (reasoning) {
      if (!this.reasoning) this.content.before((this.reasoning = element("div", "reasoning")));
      this.reasoning.append(reasoning);
    }
    if (content || reasoning) this.firstToken ??= performance.now();
    if (content) {
      this.text += content;
      this.content.classList.remove("waiting");
    }
    for (const entry of choice.logprobs?.content ?? []) this.addToken(entry);
    if (content && !this.tokens) this.draw();
    this.follow(atEnd);
  }

  addToken(entry) {
    if (!this.tokens) {
      this.content.classList.remove("waiting");
      this.content.replaceChildren((this.tokens = element("div", "tokens")));
    }
    this.tokens.append(tokenElement(entry));
  }

  /** Render what has come, at most once a frame. */
  draw() {
    if (this.drawing || this.tokens) return;
    this.drawing = requestAnimationFrame(() => {
      this.drawing = null;
      if (this.tokens) return;
      const atEnd = this.isAtEnd();
      this.content.replaceChildren(...render(this.text));
      this.follow(atEnd);
    });
  }

  end(reason = this.reason) {
    const atEnd = this.isAtEnd();
    const now = performance.now();
    this.content.classList.remove("waiting");
    const parts = [];
    const count = this.usage?.completion_tokens;
    if (count) parts.push(`${count} tokens`);
    if (this.firstToken) parts.push(`first after ${Math.round(this.firstToken - this.began)} ms`);
    if (count > 1 && now > this.firstToken) {
      parts.push(`${((1000 * (count - 1)) / (now - this.firstToken)).toFixed(0)} tokens/s`);
    }
    if (reason === "length") parts.push("cut off at the limit of tokens");
    else if (reason && reason !== "stop") parts.push(reason);
    if (!this.text && !this.reasoning) parts.unshift("nothing was said");
    this.meta.replaceChildren(element("span", "", parts.join(" · ")));
    if (this.tokens) this.meta.append(scale());
    this.follow(atEnd);
  }

  fail(reason) {
    this.content.classList.remove("waiting");
    this.message.classList.add("failed");
    this.meta.textContent = reason;
    this.meta.setAttribute("role", "alert");
    this.follow(true);
  }

  isAtEnd() {
    const { scrollTop, clientHeight, scrollHeight } = this.messages;
    return scrollTop + clientHeight > scrollHeight - 40;
  }

  /** Keep the end in sight, unless the reader has gone elsewhere. */
  follow(wanted) {
    if (wanted) this.messages.scrollTop = this.messages.scrollHeight;
  }
}
