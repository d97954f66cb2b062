// Where the page begins: who the model is, the key where one is needed, and the two views.

import { ApiError, rememberKey, request } from "./api.js";
import { startChat } from "./chat.js";
import { byId } from "./dom.js";
import { startEngine } from "./engine.js";

const DEMO = "demo";
let served = null;

async function start() {
  for (const view of ["chat", "engine"]) byId(`tab-${view}`).addEventListener("click", () => select(view));
  startChat(() => served, onError);
  await introduce();
  startEngine(onError);
  byId("prompt").focus();
}

/** Ask which model is served, and for a key until one is right. */
async function introduce() {
  for (;;) {
    try {
      const { data } = await (await request("v1/models")).json();
      const [model] = data;
      served = model.id;
      byId("model").textContent = byId("model").title = served;
      byId("demo").hidden = model.root !== DEMO;
      if (model.root === DEMO) {
        byId("welcome-text").textContent =
          "This is a tiny model that comes with jaxllm, to try things with. It knows very little.";
      }
      document.title = `${served} · jaxllm`;
      return;
    } catch (error) {
      if (error.status === 401) await askForKey();
      else {
        byId("link").dataset.state = "lost";
        byId("link").textContent = "not connected";
        await new Promise((resolve) => setTimeout(resolve, 2000));
      }
    }
  }
}

let asking = null;

/** Resolves when a key has been given; asked from several sides at once, it asks once. */
function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    const text = byId("key-text");
    if (dialog.dataset.asked) {
      text.textContent = "The server does not take this key. Try another.";
      text.classList.add("bad");
    }
    dialog.dataset.asked = "yes";
    const refuse = (event) => event.preventDefault();
    dialog.addEventListener("cancel", refuse);
    byId("key-form").addEventListener(
      "submit",
      (event) => {
        event.preventDefault();
        rememberKey(byId("key").value.trim());
        byId("key").value = "";
        dialog.removeEventListener("cancel", refuse);
        dialog.close();
        asking = null;
        resolve();
      },
      { once: true },
    );
    dialog.showModal();
  });
  return asking;
}

/** What any part of the page does with an error of the API. */
async function onError(error) {
  if (error instanceof ApiError && error.status === 401) await askForKey();
}

function select(view) {
  document.body.dataset.view = view;
  for (const name of ["chat", "engine"]) byId(`tab-${name}`).setAttribute("aria-selected", String(name === view));
}

start();
