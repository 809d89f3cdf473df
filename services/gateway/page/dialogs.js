/** The two dialogs: the key that a server asks for, and the question as code. */

import { KeyWanted, hasKey, setKey } from "./api.js";
import { byId, say } from "./dom.js";
import { Told } from "./images.js";

let waiting = null;

/** Does `action`; where the server wants a key, asks the person for one and does it again. Throws Told on Cancel. */
export async function withKey(action) {
  for (;;) {
    try {
      const done = await action();
      byId("forget").hidden = !hasKey();
      return done;
    } catch (error) {
      if (!(error instanceof KeyWanted)) throw error;
      waiting ??= askForKey(error.message).finally(() => { waiting = null; });
      await waiting;
    }
  }
}

function askForKey(words) {
  const dialog = byId("key-dialog"), box = byId("key");
  byId("key-words").textContent = words;
  box.value = "";
  return new Promise((resolve, reject) => {
    const used = (event) => {
      event.preventDefault();
      setKey(box.value.trim());
      dialog.close("used");
    };
    const closed = () => {
      byId("key-form").removeEventListener("submit", used);
      box.value = "";
      if (dialog.returnValue === "used") resolve();
      else reject(new Told("Without a key this server gives no answers."));
    };
    dialog.returnValue = "";
    byId("key-form").addEventListener("submit", used);
    byId("key-cancel").addEventListener("click", () => dialog.close(""), { once: true });
    dialog.addEventListener("close", closed, { once: true });
    dialog.showModal();
    box.focus();
  });
}

/** Shows code: `write(kind, side)` gives the text for "curl" or "python" of side 0 or 1. */
export function showCode(write, sides) {
  const dialog = byId("code-dialog"), text = byId("code-text"), copy = byId("code-copy");
  const chosen = (name) => dialog.querySelector(`input[name=${name}]:checked`).value;
  const write_ = () => {
    text.textContent = write(chosen("kind"), sides > 1 ? Number(chosen("lane")) : 0);
    copy.textContent = "Copy";
  };
  byId("code-lane").hidden = sides < 2;
  dialog.oninput = write_;
  byId("code-close").onclick = () => dialog.close();
  copy.onclick = async () => {
    if (await copied(text)) {
      copy.textContent = "Copied";
      say("Copied");
    } else {
      copy.textContent = "Selected: copy it";
    }
  };
  write_();
  dialog.showModal();
}

/** Whether the text went to the clipboard, which browsers give to pages over HTTPS or of this machine alone. */
async function copied(element) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    return true;
  } catch {
    window.getSelection().selectAllChildren(element);
    return document.execCommand("copy");
  }
}
