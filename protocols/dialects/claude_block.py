"""The pieces of content that Claude's messages are made of, as they travel."""

from typing import Annotated

import msgspec

from protocols.dialects.field import ignored, refused


class Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every block may have."""

    cache_control: object = None
    """Accepted in silence: agents set it on every turn, and it changes no token."""


class TextBlock(Base, tag="text", frozen=True):
    """Text."""

    text: str
    citations: Annotated[object, ignored([])] = None


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a picture or a document is: which field holds it depends on the type."""

    type: str
    media_type: str | None = None
    data: str | None = None
    url: str | None = None
    file_id: str | None = None
    content: str | list["TextBlock | ImageBlock"] | None = None


class ImageBlock(Base, tag="image", frozen=True):
    """A picture."""

    source: Source
    transformations: Annotated[object, refused({})] = None


class DocumentBlock(Base, tag="document", frozen=True):
    """A document, of which text and blocks are read and files are not."""

    source: Source
    title: str | None = None
    context: str | None = None
    citations: Annotated[object, ignored({}, {"enabled": False})] = None


class SearchResultBlock(Base, tag="search_result", frozen=True):
    """What a search found."""

    source: str
    title: str
    content: list[TextBlock]
    citations: Annotated[object, ignored({}, {"enabled": False})] = None


class ThinkingBlock(Base, tag="thinking", frozen=True):
    """What the assistant thought."""

    thinking: str
    signature: object = None
    """Any is taken; nothing here could check one."""


class RedactedThinkingBlock(Base, tag="redacted_thinking", frozen=True):
    """What the assistant thought, in a shape that nobody here can read."""

    data: object = None


class ToolUseBlock(Base, tag="tool_use", frozen=True):
    """A call of a tool."""

    id: str
    name: str
    input: dict[str, object]
    caller: Annotated[object, ignored({"type": "direct"})] = None
    toolset_name: Annotated[object, ignored()] = None


class ToolReferenceBlock(Base, tag="tool_reference", frozen=True):
    """A tool that was found, and is told of from now on."""

    tool_name: str


class BrowserStateBlock(msgspec.Struct, tag="browser_state", frozen=True):
    """State of a browser that is not ours."""


Given = TextBlock | ImageBlock | DocumentBlock | SearchResultBlock
"""What a user, or a tool, may hand over."""
Returned = Given | ToolReferenceBlock | BrowserStateBlock


class ToolResultBlock(Base, tag="tool_result", frozen=True):
    """What a tool answered."""

    tool_use_id: str
    content: str | list[Returned] | None = None
    is_error: bool | None = None
    toolset_name: Annotated[object, ignored()] = None


class ServerToolUse(msgspec.Struct, tag="server_tool_use", frozen=True):
    """Of Anthropic's servers, as are those below."""


class WebSearchResult(msgspec.Struct, tag="web_search_tool_result", frozen=True):
    """Of Anthropic's servers."""


class WebFetchResult(msgspec.Struct, tag="web_fetch_tool_result", frozen=True):
    """Of Anthropic's servers."""


class CodeResult(msgspec.Struct, tag="code_execution_tool_result", frozen=True):
    """Of Anthropic's servers."""


class BashResult(msgspec.Struct, tag="bash_code_execution_tool_result", frozen=True):
    """Of Anthropic's servers."""


class EditorResult(msgspec.Struct, tag="text_editor_code_execution_tool_result", frozen=True):
    """Of Anthropic's servers."""


class ToolSearchResult(msgspec.Struct, tag="tool_search_tool_result", frozen=True):
    """Of Anthropic's servers."""


class ContainerUpload(msgspec.Struct, tag="container_upload", frozen=True):
    """Of Anthropic's servers."""


class McpToolUse(msgspec.Struct, tag="mcp_tool_use", frozen=True):
    """Of Anthropic's servers."""


class McpToolResult(msgspec.Struct, tag="mcp_tool_result", frozen=True):
    """Of Anthropic's servers."""


Foreign = (
    ServerToolUse
    | WebSearchResult
    | WebFetchResult
    | CodeResult
    | BashResult
    | EditorResult
    | ToolSearchResult
    | ContainerUpload
    | McpToolUse
    | McpToolResult
)
"""Refused; a client that wants them ignored gets a conversation without them."""

Content = Given | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock | Foreign


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message."""

    role: str
    content: str | list[Content]
    """Empty only where the assistant said nothing."""
