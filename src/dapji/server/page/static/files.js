// Text files: read, or refused with the reason.

import { Problem } from "./api.js";
import { t } from "./i18n.js";
import { state } from "./state.js";

/** {name, text} of a file, where files of `used` bytes are there already. Throws Problem. */
export async function readText(file, used) {
  const limit = Math.floor(state.limits.max_body_bytes / 2); // as JSON they take more
  if (file.size + used > limit) {
    throw new Problem(t("file.large", { name: file.name, size: size(file.size), limit: size(limit) }));
  }
  const text = decode(new Uint8Array(await file.arrayBuffer()));
  if (text === null) throw new Problem(t("file.binary", { name: file.name }));
  return { name: file.name, text };
}

/** UTF-8, UTF-16 with its mark, or the older Korean encoding; null: no text. */
function decode(bytes) {
  const utf16 = { "255,254": "utf-16le", "254,255": "utf-16be" }[bytes.slice(0, 2).join()];
  for (const encoding of utf16 ? [utf16] : ["utf-8", "euc-kr"]) {
    try {
      const text = new TextDecoder(encoding, { fatal: true }).decode(bytes);
      if (!text.includes("\0")) return text;
    } catch {
      // Not in this encoding.
    }
  }
  return null;
}

export function size(bytes) {
  return bytes < 1 << 20 ? `${Math.ceil(bytes / 1024)} KiB` : `${(bytes / (1 << 20)).toFixed(1)} MiB`;
}

/** Lets the user keep a file. */
export function saveFile(blob, name) {
  const url = URL.createObjectURL(blob);
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
