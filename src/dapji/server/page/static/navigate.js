// Arrow keys move the focus to what lies there, as on a television's remote control; Enter then does what a click does.
// Every page may call `startNavigation` once. Text keeps its arrow keys up to its ends.

const FOCUSABLE = "a[href], button:not(:disabled), input:not(:disabled), select, textarea, summary, [tabindex='0']";
const DIRECTIONS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export function startNavigation() {
  addEventListener("keydown", (event) => {
    const direction = DIRECTIONS[event.key];
    if (!direction || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
    if (event.defaultPrevented || event.isComposing) return;
    const from = document.activeElement;
    if (from === document.body || keeps(from, direction)) return;
    const to = nearest(from, direction);
    if (to === null) return;
    event.preventDefault();
    to.focus();
  });
}

/** Whether the element itself does something with the key. */
function keeps(element, [x, y]) {
  if (element.matches("select")) return y !== 0;
  if (element.matches("input[type=checkbox]")) return false;
  if (element.matches("textarea, input")) {
    const [start, end] = [element.selectionStart, element.selectionEnd];
    if (start !== end) return true;
    if (y !== 0 && element.matches("input")) return false;
    return x + y < 0 ? start > 0 : end < element.value.length;
  }
  const { scrollTop, scrollLeft, scrollHeight, scrollWidth, clientHeight, clientWidth } = element;
  const style = getComputedStyle(element);
  const scrolls = (overflow, at, most) => /auto|scroll/.test(overflow) && at > 0 && at < most;
  if (y !== 0) return scrolls(style.overflowY, scrollTop + y + (y < 0 ? 1 : 0), scrollHeight - clientHeight + 1);
  return scrolls(style.overflowX, scrollLeft + x + (x < 0 ? 1 : 0), scrollWidth - clientWidth + 1);
}

function nearest(from, [x, y]) {
  const root = document.querySelector("dialog[open]") ?? document;
  const origin = from.getBoundingClientRect();
  let best = null;
  let shortest = Infinity;
  for (const element of root.querySelectorAll(FOCUSABLE)) {
    if (element === from || element.contains(from) || !element.checkVisibility({ visibilityProperty: true })) continue;
    const box = element.getBoundingClientRect();
    // How far in the direction, from edge to edge; what lies beside and not there is none.
    const ahead = x ? (x > 0 ? box.left - origin.right : origin.left - box.right) : y > 0 ? box.top - origin.bottom : origin.top - box.bottom;
    if (ahead < -4 || box.width === 0) continue;
    const aside = x
      ? Math.max(0, box.top - origin.bottom, origin.top - box.bottom)
      : Math.max(0, box.left - origin.right, origin.left - box.right);
    const middles = x
      ? Math.abs(box.top + box.bottom - origin.top - origin.bottom)
      : Math.abs(box.left + box.right - origin.left - origin.right);
    const distance = Math.max(0, ahead) + 3 * aside + 0.05 * middles;
    if (distance < shortest) [best, shortest] = [element, distance];
  }
  return best;
}
