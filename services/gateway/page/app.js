/** The page as a whole: the start, the sides, the questions, and the buttons of the bar. */

import { address, hasKey, model, setKey } from "./api.js";
import { showCode, withKey } from "./dialogs.js";
import { byId, bytes, el, say } from "./dom.js";
import { Told, fileOf, openImage } from "./images.js";
import { Lane } from "./lane.js";
import { asCurl, asPython } from "./request.js";
import { SAMPLES } from "./samples.js";

const layers = {};
let served = null, image = null, lanes = [];

async function begin() {
  trouble();
  try {
    served = await withKey(found);
  } catch (error) {
    trouble(error, begin);
    return;
  }
  byId("model").textContent = served.id;
  const most = served.focus?.max_image_bytes;
  if (most) byId("limits").textContent = `JPEG, PNG, WebP, GIF, BMP or TIFF, up to ${bytes(most)}`;
}

/** The served model; says that it looks for the server where that takes long. */
async function found() {
  const slow = setTimeout(() => { byId("model").textContent = "looking for the server\u2026"; }, 300);
  try {
    return await model();
  } finally {
    clearTimeout(slow);
    byId("model").textContent = "";
  }
}

/** Shows what went wrong, with a button that tries again; without an error, clears it. */
function trouble(error, again) {
  const place = byId("trouble");
  place.replaceChildren();
  if (!error) return;
  if (!(error instanceof Told)) console.error(error);
  const words = error instanceof Told ? error.message : "Something in this page went wrong. Reload it.";
  place.append(el("p", { class: "note", text: words }));
  if (again) place.append(el("button", { type: "button", class: "quiet", text: "Try again", click: again }));
}

/** Takes a file, or a function that gets one, as the image to ask about. */
async function take(file, more = {}) {
  trouble();
  const slow = setTimeout(() => { byId("opening").hidden = false; say("Opening the image"); }, 300);
  try {
    if (!served) await begin();
    if (!served) return;
    const opened = await openImage(typeof file === "function" ? await file() : file, served.focus);
    if (image) URL.revokeObjectURL(image.url);
    image = { ...opened, ...more };
  } catch (error) {
    trouble(error);
    return;
  } finally {
    clearTimeout(slow);
    byId("opening").hidden = true;
  }
  if (!lanes.length) lanes = [added("A")];
  for (const lane of lanes) lane.begin(image);
  ideas();
  arranged(true);
  byId("question-a").focus();
}

async function fetched(file) {
  let response;
  try {
    response = await fetch(address(`page/samples/${file}`));
  } catch {
    throw new Told("The server does not answer. It may have stopped: start it again (make serve), then try once more.");
  }
  return new File([await response.blob()], file, { type: "image/png" });
}

function sample({ file, alt, questions }) {
  return take(() => fetched(file), { alt, questions, source: address(`page/samples/${file}`) });
}

function added(name) {
  const lane = new Lane(name, served, layers);
  lane.onAgain = ({ question, fresh }) => ask([[lane, question]], fresh);
  byId("lanes").append(lane.root);
  return lane;
}

/** Shows the start or the work; what only one of them has is hidden with the other. */
function arranged(working) {
  byId("start").hidden = working;
  for (const id of ["work", "composer", "compare", "code"]) byId(id).hidden = !working;
  byId("another").hidden = !lanes.length;
  byId("another").textContent = working ? "Another image" : "Back";
  document.body.classList.toggle("at-work", working);
  comparing(lanes.length > 1);
}

function comparing(on) {
  byId("compare").setAttribute("aria-pressed", String(on));
  byId("lanes").classList.toggle("two", on);
  for (const lane of lanes) lane.root.classList.toggle("of-two", on);
  const questions = on && byId("compared").querySelector(":checked").value === "questions";
  byId("compared").hidden = !on;
  byId("box-b").hidden = !questions;
  byId("label-a").textContent = questions ? "Question A" : "Question";
  byId("label-a").classList.toggle("unseen", !questions);
  if (on) lanes[1].follow(questions ? lanes[0] : null);
  byId("ask").textContent = on ? "Ask both" : "Ask";
  for (const lane of lanes) lane.redraw();
}

function compare() {
  if (lanes.length > 1) {
    const [other] = lanes.splice(1);
    other.stop();
    other.root.remove();
    comparing(false);
    return;
  }
  const [first] = lanes, other = added("B");
  lanes.push(other);
  other.begin(image);
  other.settings.withoutSamplers();
  comparing(true);
  const asked = first.conversation;
  if (asked.length) {
    other.adopt(asked.slice(0, -1));
    ask([[other, asked.at(-1).question]]);
  }
}

function ideas() {
  const chips = image.questions.map((question) =>
    el("button", { type: "button", class: "idea", text: question, click: () => submit(question, true) }));
  byId("ideas").replaceChildren(...chips);
}

/** Asks each side its question, all at once. fresh: each begins a conversation. */
async function ask(pairs, fresh = false) {
  busy(true);
  await Promise.all(pairs.map(([lane, question]) => lane.ask(question, fresh)));
  busy(lanes.some((lane) => lane.busy));
}

function busy(now) {
  byId("ask").hidden = now;
  byId("stop").hidden = !now;
  for (const idea of byId("ideas").children) idea.disabled = now;
  byId("afresh").disabled = now || !lanes.some((lane) => lane.turns.length);
  if (!now && document.activeElement === document.body) byId("question-a").focus();
}

/** Asks what the boxes hold, or a question to try, which is no follow-up. */
function submit(question, fresh) {
  if (lanes.some((lane) => lane.busy)) return;
  const boxes = [byId("question-a"), byId("question-b")];
  const a = question ?? boxes[0].value.trim(), b = (!byId("box-b").hidden && boxes[1].value.trim()) || a;
  if (!a) {
    say("Write a question first");
    boxes[0].focus();
    return;
  }
  for (const box of boxes) { box.value = ""; grown(box); }
  ask(lanes.map((lane, index) => [lane, index ? b : a]), fresh);
}

/** As high as its text, up to what its style allows. */
function grown(box) {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

function code(kind, side) {
  const lane = lanes[side], written = byId("question-a").value.trim();
  const turns = lane.conversation, last = turns.at(-1);
  const question = written || last?.question || image.questions[0] || "What is in this image?";
  const asked = { model: served.id, turns: written ? turns : turns.slice(0, -1), question, settings: lane.chosen };
  const file = { name: image.name, type: image.blob.type || "image/png", source: image.source ?? null };
  return kind === "curl" ? asCurl(asked, file, address("v1/chat/completions"), hasKey())
                         : asPython(asked, file, address("v1"), hasKey());
}

const THEME = "focusllava-theme";

function theme(chosen) {
  if (chosen) document.documentElement.dataset.theme = chosen;
  const dark = (chosen || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  byId("theme").textContent = dark ? "Light" : "Dark";
  byId("theme").onclick = () => {
    const next = dark ? "light" : "dark";
    localStorage.setItem(THEME, next);
    theme(next);
  };
}

function listen() {
  byId("choose").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (file) take(file);
  });
  const isFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  for (const kind of ["dragover", "dragenter"]) {
    document.addEventListener(kind, (event) => {
      if (!isFile(event)) return;
      event.preventDefault();
      document.body.classList.add("dragging");
    });
  }
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dragging");
    if (!isFile(event)) return;
    event.preventDefault();
    const file = fileOf(event.dataTransfer);
    if (file) take(file);
  });
  document.addEventListener("paste", (event) => {
    const file = fileOf(event.clipboardData);
    if (!file) return;
    event.preventDefault();
    take(file);
  });
  byId("another").addEventListener("click", () => {
    const working = byId("work").hidden;
    trouble();
    arranged(working);
    byId(working ? "question-a" : "choose").focus();
  });
  byId("compare").addEventListener("click", compare);
  byId("compared").addEventListener("change", () => comparing(true));
  byId("code").addEventListener("click", () => showCode(code, lanes.length));
  byId("forget").addEventListener("click", () => {
    setKey("");
    byId("forget").hidden = true;
    say("The key is forgotten");
  });
  byId("forget").hidden = !hasKey();
  byId("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  for (const box of [byId("question-a"), byId("question-b")]) {
    box.addEventListener("input", () => grown(box));
    box.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      submit();
    });
  }
  byId("stop").addEventListener("click", () => { for (const lane of lanes) lane.stop(); });
  byId("afresh").addEventListener("click", () => {
    for (const lane of lanes) lane.begin(null);
    byId("afresh").disabled = true;
    byId("question-a").focus();
  });
  for (const box of byId("layers").elements) {
    if (box.type !== "checkbox") continue;
    layers[box.name] = box.checked;
    box.addEventListener("change", () => {
      layers[box.name] = box.checked;
      for (const lane of lanes) lane.redraw();
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme(localStorage.getItem(THEME)));
}

theme(localStorage.getItem(THEME));
byId("samples").append(...SAMPLES.map((one) =>
  el("li", {}, el("button", { type: "button", class: "sample", click: () => sample(one) },
    el("span", { class: "thumb" }, el("img", { src: `page/samples/${one.file}`, alt: "", loading: "lazy" })),
    el("span", { text: one.name })))));
listen();
begin();
