//! Where a token may be used from.

use std::fmt;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::environment::parse_range;
use crate::identity::SourceAddress;

/// A place that calls may come from. Written as text: `10.0.0.0/8`, `2001:db8::1/128`, `unix`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum SourceRange {
    /// A Unix socket of the broker's machine.
    Unix,
    /// A range of addresses.
    Network(IpNet),
}

impl SourceRange {
    /// Parses a CIDR range, an address alone, or `unix`.
    ///
    /// # Errors
    /// What is wrong with it and the mend.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text == "unix" {
            return Ok(Self::Unix);
        }
        match parse_range(text)? {
            // Callers are known by their IPv4 address, however the connection writes it: this one would fit nobody.
            IpNet::V6(range) if range.addr().to_ipv4_mapped().is_some() => {
                Err(format!("`{range}` stands for IPv4 addresses; write them as IPv4"))
            }
            range => Ok(Self::Network(range)),
        }
    }

    /// Whether `source` lies within it. The broker itself lies nowhere.
    #[must_use]
    pub fn holds(&self, source: &SourceAddress) -> bool {
        match self {
            Self::Unix => matches!(source, SourceAddress::Unix { .. }),
            Self::Network(range) => source.ip().is_some_and(|address| range.contains(&address)),
        }
    }
}

impl fmt::Display for SourceRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix => f.write_str("unix"),
            Self::Network(range) => range.fmt(f),
        }
    }
}

impl From<SourceRange> for String {
    fn from(range: SourceRange) -> Self {
        range.to_string()
    }
}

impl TryFrom<String> for SourceRange {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(address: &str) -> SourceAddress {
        SourceAddress::Tcp(address.parse().unwrap())
    }

    #[test]
    fn a_range_holds_what_lies_in_it() {
        let unix = SourceAddress::Unix { pid: None };
        let everywhere = [tcp("10.1.2.3:4"), tcp("[::ffff:10.1.2.3]:4"), tcp("[2001:db8::9]:4"), unix];
        for (text, held) in [
            ("10.0.0.0/8", [true, true, false, false]),
            ("10.1.2.3", [true, true, false, false]),
            ("10.1.2.4", [false, false, false, false]),
            ("2001:db8::/32", [false, false, true, false]),
            ("0.0.0.0/0", [true, true, false, false]),
            ("::/0", [false, false, true, false]),
            ("unix", [false, false, false, true]),
        ] {
            let range = SourceRange::parse(text).unwrap();
            assert_eq!(everywhere.each_ref().map(|source| range.holds(source)), held, "{text}");
            assert!(!range.holds(&SourceAddress::Internal), "{text}");
        }
    }

    #[test]
    fn a_range_is_written_as_it_is_read() {
        for (text, shown) in [("unix", "unix"), ("10.0.0.0/8", "10.0.0.0/8"), ("10.0.0.1", "10.0.0.1/32")] {
            let range = SourceRange::parse(text).unwrap();
            let json = serde_json::to_string(&range).unwrap();
            assert_eq!(json, format!("\"{shown}\""));
            assert_eq!(serde_json::from_str::<SourceRange>(&json).unwrap(), range);
        }
        for bad in ["", "Unix", "unix ", "10.0.0.1/8", "10.0.0.0/33", "::ffff:10.0.0.1", "example.com"] {
            assert!(SourceRange::parse(bad).is_err(), "{bad:?}");
        }
    }
}
