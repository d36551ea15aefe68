//! Which trace a call belongs to, as its caller says (W3C Trace Context, Level 1, "traceparent Header").
//!
//! ```text
//! 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01
//! version  trace id (16 bytes)         parent (8)    flags
//! ```
//!
//! A header that breaks the grammar is ignored, as the recommendation asks: it must not fail a call.

use std::fmt;
use std::num::NonZeroU128;

/// The header's name.
pub const HEADER: &str = "traceparent";

/// The id that all calls of one trace share. Never zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceId(NonZeroU128);

impl TraceId {
    /// The trace id of a `traceparent` header; `None` where the header breaks the grammar.
    #[must_use]
    pub fn parse(header: &str) -> Option<Self> {
        let mut parts = header.splitn(5, '-');
        let (version, trace) = (hex(parts.next()?, 2)?, hex(parts.next()?, 32)?);
        let (parent, _flags) = (hex(parts.next()?, 16)?, hex(parts.next()?, 2)?);
        // Version 255 is none. A later version may have more behind it, and reads as this one as far as this one goes.
        let ends = parts.next().is_none() || version > 0;
        let id = NonZeroU128::new(trace).filter(|_| version != 0xff && parent != 0 && ends)?;
        Some(Self(id))
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0.get())
    }
}

/// So many lower-case hex digits, and nothing else.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let lower = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    (text.len() == digits && lower).then(|| u128::from_str_radix(text, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    #[test]
    fn the_trace_id_is_read_and_written_alike() {
        let id = TraceId::parse(&format!("00-{TRACE}-00f067aa0ba902b7-01")).unwrap();
        assert_eq!(id.to_string(), TRACE);
        let small = "00-00000000000000000000000000000001-0000000000000001-00";
        assert_eq!(TraceId::parse(small).unwrap().to_string(), "00000000000000000000000000000001");
    }

    #[test]
    fn a_later_version_reads_as_far_as_it_is_known() {
        assert!(TraceId::parse(&format!("01-{TRACE}-00f067aa0ba902b7-01-more-of-it")).is_some());
        assert!(TraceId::parse(&format!("cc-{TRACE}-00f067aa0ba902b7-01")).is_some());
    }

    #[test]
    fn what_breaks_the_grammar_is_none() {
        for bad in [
            "",
            "-",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e47361-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            " 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-1",
        ] {
            assert_eq!(TraceId::parse(bad), None, "{bad:?}");
        }
    }
}
