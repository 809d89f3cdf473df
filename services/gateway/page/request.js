/** A conversation about an image -> the body of POST /v1/chat/completions, and the same as code for a terminal. */

/** The body: `turns` are [{question, answer}] of before; `image` is a data: URL. */
export function chatRequest({ model, image, turns, question, settings }) {
  const picture = { type: "image_url", image_url: { url: image } };
  if (settings.detail !== "auto") picture.image_url.detail = settings.detail;
  const words = (text) => ({ type: "text", text });
  const messages = [];
  for (const turn of [...turns, { question }]) {
    const first = messages.length === 0;
    messages.push({ role: "user", content: first ? [picture, words(turn.question)] : turn.question });
    if (turn.answer !== undefined) messages.push({ role: "assistant", content: turn.answer });
  }
  const body = { model, messages, max_tokens: settings.maxTokens };
  const focus = settings.focus();
  return Object.keys(focus).length ? { ...body, focus } : body;
}

const IMAGE = "IMAGE-GOES-HERE";

/** The request as a command: bash, curl and base64 alone. `image`: {name, type, source}; source: where to get it, or null. */
export function asCurl(asked, image, url, keyed) {
  const body = JSON.stringify(chatRequest({ ...asked, image: IMAGE }), null, 2);
  const format = body.replaceAll("\\", "\\\\").replaceAll("%", "%%").replaceAll("'", "'\\''");
  const filled = format.replace(IMAGE, `data:${image.type};base64,%s`);
  const lines = image.source ? [`curl -sO ${quoted(image.source)}`] : [];
  lines.push(`printf '${filled}' "$(base64 < ${quoted(image.name)} | tr -d '\\n')" |`);
  const key = keyed ? '\n  -H "authorization: Bearer $FOCUSLLAVA_API_KEY" \\' : "";
  lines.push(`curl -s ${quoted(url)} \\${key}\n  -H 'content-type: application/json' -d @-`);
  return `${lines.join("\n")}\n`;
}

/** The request as a program with the openai package. */
export function asPython(asked, image, url, keyed) {
  const { focus, model, messages, max_tokens: most } = chatRequest({ ...asked, image: IMAGE });
  const literal = python(messages, 4).replace(JSON.stringify(IMAGE), `f"data:${image.type};base64,{picture}"`);
  const source = image.source
    ? `file = urllib.request.urlopen(${JSON.stringify(image.source)}).read()`
    : `file = pathlib.Path(${JSON.stringify(image.name)}).read_bytes()`;
  return `import base64
import ${keyed ? "os\nimport " : ""}${image.source ? "urllib.request" : "pathlib"}

from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(url)}, api_key=${keyed ? 'os.environ["FOCUSLLAVA_API_KEY"]' : '"none"'})
${source}
picture = base64.b64encode(file).decode()
answer = client.chat.completions.create(
    model=${JSON.stringify(model)},
    messages=${literal},
    max_tokens=${most},${focus ? `\n    extra_body={"focus": ${python(focus, 4)}},` : ""}
)
print(answer.choices[0].message.content)
print(answer.focus["converted_share_percent"], "% of the visual tokens")
`;
}

const quoted = (text) => (/^[\w./:@-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

/** A value of JSON as Python writes it. */
function python(value, indent) {
  const inner = " ".repeat(indent + 4), end = `\n${" ".repeat(indent)}`;
  if (Array.isArray(value)) return `[\n${value.map((one) => `${inner}${python(one, indent + 4)},`).join("\n")}${end}]`;
  if (value && typeof value === "object") {
    const entries = Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${python(one, indent)}`);
    return `{${entries.join(", ")}}`;
  }
  if (typeof value === "boolean") return value ? "True" : "False";
  return JSON.stringify(value);
}
