"""The wire formats: framing and codecs. Bytes only; no cryptography, no I/O."""

from .beginnings import NEGOTIATE_STREAM_KNOWN_BY as NEGOTIATE_STREAM_KNOWN_BY
from .beginnings import is_negotiate_stream as is_negotiate_stream
from .codecs import DEFAULT_MAX_MESSAGE_SIZE as DEFAULT_MAX_MESSAGE_SIZE
from .codecs import LARGEST_MAX_MESSAGE_SIZE as LARGEST_MAX_MESSAGE_SIZE
from .codecs import SAMPLE_RECORD_SIZE as SAMPLE_RECORD_SIZE
from .codecs import Codec as Codec
from .codecs import FramedCodec as FramedCodec
from .codecs import MessageCodec as MessageCodec
from .codecs import WireFormat as WireFormat
from .codecs import check_max_message_size as check_max_message_size
from .codecs import make_codec as make_codec
from .negotiate_stream import RECORD_DATA_SIZE as RECORD_DATA_SIZE
from .negotiate_stream import NegotiateStreamCodec as NegotiateStreamCodec
