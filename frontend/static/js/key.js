// The API key, where the server wants one (--api-key): asked for once, kept in this tab.

const NAME = "minivllm-api-key";
let asking = null;

export function authorization() {
  const key = sessionStorage.getItem(NAME);
  return key ? { authorization: `Bearer ${key}` } : {};
}

/** Shows the dialog (once, whoever asks) and waits for a key. */
export function askForKey() {
  const dialog = document.getElementById("login");
  asking ??= new Promise((resolve) => {
    dialog.oncancel = (event) => event.preventDefault();
    dialog.onclose = () => {
      const field = document.getElementById("key");
      sessionStorage.setItem(NAME, field.value);
      field.value = "";
      asking = null;
      resolve();
    };
    dialog.showModal();
  });
  return asking;
}
