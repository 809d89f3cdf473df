/** One side of the page: an image, its settings, the conversation about it, and what the shown answer came from. */

import { stream } from "./api.js";
import { counterParts } from "./counter.js";
import { withKey } from "./dialogs.js";
import { byId, count, el, percent, say } from "./dom.js";
import { decoded, inWords, kernelName } from "./focus_map.js";
import { Told, dataUrl } from "./images.js";
import { draw } from "./overlay.js";
import { chatRequest } from "./request.js";
import { Settings } from "./settings.js";

const PATIENCE_MS = 300;
/** How long something may take before the page says that it goes on. */

export class Lane {
  constructor(name, served, layers) {
    this.root = byId("lane").content.firstElementChild.cloneNode(true);
    this.name = name;
    this.served = served;
    this.layers = layers;
    this.turns = [];
    const find = (selector) => this.root.querySelector(selector);
    this.parts = { title: find(".lane-title"), frame: find(".frame"), picture: find(".picture"), canvas: find(".overlay"),
      legend: find(".legend"), talk: find(".talk"), working: find(".working"),
      workingWords: find(".working-words"), counter: find(".counter"), see: find(".see") };
    this.settings = new Settings(find(".settings-form"), find(".settings-now"), () => this.#title());
    this.settings.begin(served.focus);
    find(".settings").open = false;
    this.root.setAttribute("aria-label", `Side ${name}`);
    this.#title();
    this.#hovering();
    new ResizeObserver(() => this.redraw()).observe(this.parts.frame);
  }

  #title() {
    this.parts.title.textContent = this.leader ? this.name : `${this.name}: ${this.settings.inWords()}`;
  }

  /** Asks with another side's settings from now on; with null, with its own. */
  follow(leader) {
    this.leader = leader;
    this.root.classList.toggle("follows", Boolean(leader));
    this.#title();
  }

  /** The settings to ask with. */
  get chosen() {
    return (this.leader ?? this).settings;
  }

  /** Begins anew with this image; null keeps the one that is there. */
  begin(image) {
    this.stop();
    if (image) {
      this.image = image;
      this.parts.picture.src = image.url;
      this.parts.picture.alt = image.alt;
      this.parts.picture.hidden = !image.width;
      if (image.width) this.#shape(image);
    }
    this.turns = [];
    this.parts.talk.replaceChildren();
    this.show(null);
  }

  /** Takes over another side's conversation. */
  adopt(turns) {
    for (const { question, answer, map, focus, speed, fresh } of turns) {
      this.#added({ question, answer, map, focus, speed, fresh, state: "done" });
    }
  }

  get busy() {
    return this.controller !== undefined;
  }

  /** The turns that are part of the conversation: those that were answered since it was last begun anew. */
  get conversation() {
    return this.turns.slice(this.turns.findLastIndex((turn) => turn.fresh)).filter((turn) => turn.state === "done");
  }

  stop() {
    this.controller?.abort();
  }

  /** Asks, and shows the answer as it comes. fresh: what was said before is not sent. */
  async ask(question, fresh) {
    const first = fresh || !this.turns.length;
    const turn = this.#added({ question, answer: "", map: null, focus: null, speed: null, fresh: first, state: "working" });
    const controller = (this.controller = new AbortController());
    const asked = { model: this.served.id, turns: this.conversation, question, settings: this.chosen };
    const done = this.#working("Reading the file\u2026");
    try {
      const image = await (this.image.data ??= dataUrl(this.image.blob));
      const body = chatRequest({ ...asked, image });
      body.focus = { ...body.focus, return_map: true };
      body.stream = true;
      body.stream_options = { include_usage: true, continuous_usage_stats: true };
      done.words("The model looks at the image\u2026");
      await withKey(() => stream(body, controller.signal, (chunk) => this.#take(turn, chunk, done)));
      turn.state = "done";
      say(`Answer${this.root.classList.contains("of-two") ? ` ${this.name}` : ""}: ${turn.answer.trim()}`);
    } catch (error) {
      turn.state = controller.signal.aborted && turn.answer ? "done" : "failed";
      if (turn.state === "failed") turn.error = controller.signal.aborted ? "Stopped." : told(error);
      else turn.note = "Stopped here.";
    } finally {
      done();
      this.controller = undefined;
      this.#render(turn);
      if (turn.state === "done") this.show(turn);
      turn.element.item.scrollIntoView({ block: "nearest" });
    }
  }

  #take(turn, chunk, done) {
    const now = performance.now(), text = chunk.choices[0]?.delta?.content;
    if (text) {
      if (!turn.answer) done.words("Answering\u2026");
      turn.answer += text;
      turn.element.answer.textContent = turn.answer.trimStart();
      if (turn.answer.length === text.length) turn.element.item.scrollIntoView({ block: "nearest" });
    }
    if (chunk.usage?.completion_tokens) {
      const { completion_tokens: tokens } = chunk.usage;
      turn.first ??= { at: now, tokens };
      const seconds = (now - turn.first.at) / 1000;
      if (tokens > turn.first.tokens && seconds > 0) turn.speed = (tokens - turn.first.tokens) / seconds;
    }
    if (chunk.focus?.maps) {
      turn.map = chunk.focus.maps.length ? decoded(chunk.focus.maps[0]) : null;
      this.show(turn);
    }
    if (chunk.focus?.visual_tokens_kept !== undefined) turn.focus = chunk.focus;
  }

  /** Says what goes on once it has taken PATIENCE_MS; the function that is returned ends it. */
  #working(words) {
    const { working, workingWords, see } = this.parts;
    const timer = setTimeout(() => {
      working.hidden = false;
      working.scrollIntoView({ block: "nearest" });
      say(workingWords.textContent);
    }, PATIENCE_MS);
    see.setAttribute("aria-busy", "true");
    const end = () => {
      clearTimeout(timer);
      working.hidden = true;
      see.removeAttribute("aria-busy");
    };
    end.words = (now) => { workingWords.textContent = now; };
    end.words(words);
    return end;
  }

  #added(turn) {
    const answer = el("p", { class: "answer" }), after = el("div", { class: "after" });
    const anew = turn.fresh && this.turns.length ? el("p", { class: "anew", text: "New conversation" }) : null;
    const item = el("li", {}, anew, el("p", { class: "asked", text: turn.question }), answer, after);
    turn.element = { item, answer, after };
    this.turns.push(turn);
    this.parts.talk.append(item);
    this.#render(turn);
    return turn;
  }

  #render(turn) {
    const { item, answer, after } = turn.element;
    answer.textContent = turn.answer.trimStart();
    answer.hidden = turn.state === "failed" && !turn.answer;
    if (turn.state === "done" && !turn.answer.trim()) answer.textContent = "(no words)";
    after.replaceChildren();
    if (turn.error) {
      const again = () => { this.#removed(turn); this.onAgain(turn); };
      after.append(el("p", { class: "note", role: "alert", text: turn.error }),
        el("button", { type: "button", class: "quiet", text: "Ask again", click: again }));
    }
    if (turn.note) after.append(el("p", { class: "small", text: turn.note }));
    for (const note of turn.focus?.images?.flatMap((image) => image.notes) ?? []) {
      after.append(el("p", { class: "small", text: note }));
    }
    if (turn.map && turn.state === "done") {
      turn.element.look = el("button", { type: "button", class: "quiet look", text: "Show where it looked",
        click: () => this.show(turn) });
      after.append(turn.element.look);
    }
    item.classList.toggle("failed", turn.state === "failed");
  }

  #removed(turn) {
    this.turns = this.turns.filter((other) => other !== turn);
    turn.element.item.remove();
  }

  /** Shows what this answer came from; null shows the image alone. */
  show(turn) {
    this.shown = turn;
    for (const { element } of this.turns) element.look?.setAttribute("aria-pressed", String(element === turn?.element));
    this.root.classList.toggle("several", this.turns.filter((other) => other.map).length > 1);
    const { counter, picture } = this.parts;
    counter.hidden = !turn?.focus;
    if (turn?.focus) counter.replaceChildren(...counterParts(turn.focus, turn.speed));
    if (turn?.map && picture.hidden) this.#shape(turn.map);
    this.redraw();
  }

  #shape({ width, height }) {
    this.parts.frame.style.setProperty("--aspect", String(width / height));
  }

  redraw() {
    if (!this.parts.canvas.isConnected) return;
    const map = this.shown?.map ?? null;
    draw(this.parts.canvas, map, this.layers);
    this.parts.legend.replaceChildren(...(map ? legend(map, this.layers) : []));
  }

  /** Says of the token under the pointer what became of it. */
  #hovering() {
    const { frame } = this.parts;
    frame.addEventListener("pointermove", (event) => {
      const map = this.shown?.map, box = frame.getBoundingClientRect();
      if (!map) return;
      const x = ((event.clientX - box.left) / box.width) * map.width, y = ((event.clientY - box.top) / box.height) * map.height;
      const inside = (one) => one.x0 <= x && x < one.x1 && one.y0 <= y && y < one.y1;
      const token = map.tokens.find((one) => one.base === Boolean(this.layers.overview) && inside(one));
      const region = map.regions?.cells.find(inside);
      const said = token ? [token.kept ? "kept" : "dropped"] : [];
      if (token?.heat != null) said.push(`importance ${percent(token.heat)} of the largest`);
      if (region) said.push(`region at ${kernelName(map.regions.kernels[region.branch])}`);
      frame.title = said.join(", ");
    });
  }
}

function told(error) {
  if (error instanceof Told) return error.message;
  console.error(error);
  return "Something in this page went wrong. Reload it, and ask again.";
}

/** What the colours mean, and the map in words. */
function legend(map, layers) {
  const entries = [];
  const entry = (kind, text) => entries.push(el("li", {}, el("span", { class: `swatch ${kind}`, "aria-hidden": "true" }), text));
  const dropped = map.kept < map.all;
  if (layers.kept && dropped) entry("kept", "kept for this question");
  if (layers.dim && dropped) entry("dim", "dropped");
  if (layers.importance && map.tokens.some((token) => token.heat !== null)) entry("heat", "importance, from none to the largest");
  if (layers.regions && map.regions) {
    for (const [branch, kernel] of map.regions.kernels.entries()) {
      const share = percent(kernel.regions / map.regions.cells.length);
      entry(`branch-${branch}`, `${kernelName(kernel)}: ${share} of the regions`);
    }
  } else if (layers.regions) entry("none", "no regions: nothing was merged");
  return [el("ul", {}, ...entries), el("p", { class: "small map-words", text: inWords(map) })];
}
