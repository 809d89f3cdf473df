/** Files that a person drops, pastes or chooses -> an image that can be shown and sent. */

import { bytes } from "./dom.js";

/** Something that the person must be told, in words. */
export class Told extends Error {}

/** Kinds that the server reads and most browsers cannot show. */
const isTiff = (head) => ["73,73,42,0", "77,77,0,42"].includes(head.slice(0, 4).join());

/**
 * {name, url, width, height, size, blob}: `url` shows it; width and height are 0 where the browser cannot.
 * Throws Told for what is no image, and for one beyond the server's limits.
 */
export async function openImage(file, limits = {}) {
  const name = file.name || "pasted.png";
  if (!file.size) throw new Told(`${name} is empty.`);
  if (limits.max_image_bytes && file.size > limits.max_image_bytes) {
    const most = bytes(limits.max_image_bytes);
    throw new Told(`${name} has ${bytes(file.size)}; this server takes images of up to ${most}.`);
  }
  let width = 0, height = 0;
  try {
    const bitmap = await createImageBitmap(file);
    ({ width, height } = bitmap);
    bitmap.close();
  } catch {
    const head = [...new Uint8Array(await file.slice(0, 4).arrayBuffer())];
    if (!isTiff(head)) {
      throw new Told(`${name} cannot be opened as an image. It may be damaged or cut off, or of another kind: ` +
                     "JPEG, PNG, WebP, GIF, BMP and TIFF can be read.");
    }
  }
  if (limits.max_image_pixels && width * height > limits.max_image_pixels) {
    const most = Math.floor(limits.max_image_pixels / 1e6);
    throw new Told(`${name} has ${width} x ${height} pixels; this server takes up to ${most} million.`);
  }
  return { name, blob: file, size: file.size, width, height, url: URL.createObjectURL(file), alt: name, questions: [] };
}

/** The file as a data: URL. */
export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Told("The file can no longer be read. Choose it again."));
    reader.readAsDataURL(blob);
  });
}

/** The first file of a drop or a paste, or null. */
export function fileOf(transfer) {
  return [...(transfer?.files ?? [])][0] ?? null;
}
