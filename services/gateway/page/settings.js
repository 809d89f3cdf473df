/** The samplers' settings of one side: read from its form, sent, and told in a few words. */

import { percent } from "./dom.js";

/** What both samplers do by default, as GET /v1/models says under `focus`. */
export class Settings {
  constructor(form, summary, changed) {
    this.form = form;
    this.summary = summary;
    form.addEventListener("input", () => { this.show(); changed(); });
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  /** Starts with the served model's own. */
  begin(defaults) {
    this.defaults = defaults;
    const { vision_sampler: merges, text_sampler: drops, threshold, max_tokens: most } = this.form.elements;
    merges.checked = defaults.vision_sampler ?? true;
    merges.disabled = defaults.vision_sampler === false;
    drops.checked = defaults.text_sampler ?? true;
    drops.disabled = defaults.text_sampler === false;
    threshold.value = defaults.threshold ?? 0.99;
    if (defaults.max_tokens) most.max = defaults.max_tokens;
    this.show();
  }

  /** Turns both samplers off, for a side that shows what they change. */
  withoutSamplers() {
    this.form.elements.vision_sampler.checked = false;
    this.form.elements.text_sampler.checked = false;
    this.form.dispatchEvent(new Event("input"));
  }

  /** The request's `focus`: what differs from the model's own. */
  focus() {
    const { vision_sampler: merges, text_sampler: drops, map_share: share, rule, threshold, keep_ratio: ratio } = this.form.elements;
    const chosen = {};
    if (!merges.checked && !merges.disabled) chosen.vision_sampler = false;
    if (merges.checked && share.value < 100) chosen.map_share = share.value / 100;
    if (!drops.checked && !drops.disabled) chosen.text_sampler = false;
    if (drops.checked && rule.value === "threshold") chosen.threshold = Number(threshold.value);
    if (drops.checked && rule.value === "keep_ratio") chosen.keep_ratio = ratio.value / 100;
    return chosen;
  }

  get detail() {
    return this.form.elements.low.checked ? "low" : "auto";
  }

  get maxTokens() {
    const box = this.form.elements.max_tokens, asked = Math.round(Number(box.value));
    return Math.min(Math.max(1, asked || 256), Number(box.max) || Infinity);
  }

  /** The settings in a few words. */
  inWords() {
    const chosen = this.focus(), said = [];
    if (chosen.vision_sampler === false) said.push("nothing merged");
    if (chosen.map_share) said.push(`merged to ${percent(chosen.map_share)}`);
    if (chosen.text_sampler === false) said.push("nothing dropped");
    if (chosen.threshold) said.push(`threshold ${chosen.threshold}`);
    if (chosen.keep_ratio) said.push(`budget ${percent(chosen.keep_ratio)}`);
    if (this.detail === "low") said.push("overview only");
    return said.join(", ") || "the model's own";
  }

  /** Shows values beside their sliders, and hides what has no effect. */
  show() {
    const form = this.form, { map_share: share, threshold, keep_ratio: ratio, vision_sampler: merges, text_sampler: drops } = form.elements;
    const beside = (slider, text) => { form.querySelector(`[data-of=${slider.name}]`).textContent = text; };
    beside(share, share.value === "100" ? "no limit" : percent(share.value / 100));
    beside(threshold, threshold.value);
    beside(ratio, percent(ratio.value / 100));
    share.parentElement.hidden = !merges.checked;
    form.querySelector(".rule").hidden = !drops.checked;
    form.querySelector(".for-threshold").hidden = !drops.checked || form.elements.rule.value !== "threshold";
    form.querySelector(".for-budget").hidden = !drops.checked || form.elements.rule.value !== "keep_ratio";
    this.summary.textContent = this.inWords();
  }
}
