"""Read YAML of settings: no key twice, no text that grows when it is read."""

from typing import Any

import yaml


class SettingsLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses keys that come twice, and references to lists and mappings.

    A few lines of nested references stand for billions of values.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        referred = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if referred and not isinstance(node, yaml.ScalarNode):
            raise yaml.composer.ComposerError(
                None, None, "a reference to a list or a mapping; expected it in full", mark
            )
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} comes twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ValueError: the text is not YAML, has a key twice, or refers to a list or a mapping.
    """
    try:
        return yaml.load(text, SettingsLoader)
    except (yaml.YAMLError, RecursionError, TypeError, AttributeError) as error:
        raise ValueError(" ".join(str(error).replace('in "<unicode string>", ', "at ").split())) from error
