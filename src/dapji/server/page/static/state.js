// What the chat shows: one object that its modules share.

export const state = {
  /** From /v1/models. */
  models: [],
  limits: {},
  /** By name, from /page/models: what may be chosen for a model's answers. */
  choices: new Map(),
  conversation: begun(),
  /** Answers under way, by conversation. */
  writings: new Map(),
};

/** A conversation that the server does not know yet. */
export function begun() {
  return { id: null, title: "", settings: {}, leaf: null, turns: [], answering: [] };
}

export const findTurn = (conversation, number) => conversation.turns.find((turn) => turn.number === number);

/** The turns up to the leaf. */
export function branch(conversation) {
  const path = [];
  for (let turn = findTurn(conversation, conversation.leaf); turn; turn = findTurn(conversation, turn.parent)) {
    path.unshift(turn);
  }
  return path;
}

/** The versions of a turn, itself one of them, in their order. */
export const versions = (conversation, turn) =>
  conversation.turns.filter((other) => other.parent === turn.parent && other.role === turn.role);

/** The end of the branch that was last added to after a turn. */
export function newestLeaf(conversation, number) {
  const next = conversation.turns.findLast((turn) => turn.parent === number);
  return next === undefined ? number : newestLeaf(conversation, next.number);
}

export const modelOf = (conversation) => conversation.settings.model ?? state.models[0]?.id;
