// What the scripts share: the sample image, its question, and one line of JSON for each thing tried.
import { readFileSync } from 'node:fs';

export const [baseURL, model] = process.argv.slice(2);
export const image = readFileSync(new URL('../../../docs/assets/sample.png', import.meta.url));
export const imageUrl = `data:image/png;base64,${image.toString('base64')}`;
export const question = 'What number is on the red card?';

/** Prints {"case": name, "said": what it returned}, or "failed" with the exception, for each. */
export async function tell(cases) {
  for (const [name, run] of Object.entries(cases)) {
    let line;
    try {
      line = { said: await run() };
    } catch (error) {
      line = { failed: `${error.name}: ${error.message}`.slice(0, 1000) };
    }
    console.log(JSON.stringify({ case: name, ...line }));
  }
}
