// A colour for each request, the same everywhere on the page: neighbours in the order of arrival differ most.

const HUES = [172, 28, 262, 340, 208, 78, 300, 12, 140, 232, 48, 320];

export function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

export function color(handle) {
  const hue = HUES[handle % HUES.length];
  const lightness = (isDark() ? 62 : 52) - 7 * (Math.floor(handle / HUES.length) % 3);
  return `hsl(${hue} 42% ${lightness}%)`;
}

/** The value of a custom property of page.css, resolved for the present theme. */
export function themeColor(name) {
  const probe = document.createElement("i");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}
