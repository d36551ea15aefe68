//! Places for connections: so many over all listeners, so many for one caller, and of those that have not yet shown
//! who they are no more than half, so that silent strangers on the network leave room on the Unix socket.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ConnectionInfo;
use crate::identity::SourceAddress;
use crate::server::Limits;

/// The places, shared by all listeners.
#[derive(Debug, Clone)]
pub struct Places {
    connections: usize,
    per_caller: usize,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Debug, Default)]
struct Taken {
    open: usize,
    in_handshake: usize,
    callers: HashMap<Caller, usize>,
    refused: u64,
}

/// Whose connections are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Caller {
    /// Who the kernel says it is.
    Uid(u32),
    /// An IPv4 address; of an IPv6 address the first 64 bits, because who has one of a /64 has all of it.
    Ip(IpAddr),
    /// Nobody can be told.
    Unknown,
}

impl Caller {
    fn of(info: &ConnectionInfo) -> Self {
        match (&info.peer, &info.source) {
            (Some(peer), _) => Self::Uid(peer.uid),
            (None, SourceAddress::Tcp(address)) => Self::Ip(network(address.ip().to_canonical())),
            (None, SourceAddress::Unix { .. } | SourceAddress::Internal) => Self::Unknown,
        }
    }
}

fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
    }
}

/// Why there is no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    Everyone,
    Caller,
    Handshakes,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Everyone => "the bound on connections is reached",
            Self::Caller => "the bound on connections of one caller is reached",
            Self::Handshakes => "half of all connections are in their handshake",
        })
    }
}

impl Places {
    /// The places that the limits give.
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        let (connections, per_caller) = (limits.connections, limits.connections_per_caller);
        Self { connections, per_caller, taken: Arc::default() }
    }

    /// How many connections are open now.
    #[must_use]
    pub fn open(&self) -> usize {
        lock(&self.taken).open
    }

    /// How many were closed at once, because there was no place for them.
    #[must_use]
    pub fn refused(&self) -> u64 {
        lock(&self.taken).refused
    }

    /// A place, until it is dropped.
    pub(super) fn take(&self, info: &ConnectionInfo, in_handshake: bool) -> Result<Place, Full> {
        let caller = Caller::of(info);
        let mut taken = lock(&self.taken);
        let of_caller = taken.callers.get(&caller).copied().unwrap_or(0);
        let full = if taken.open >= self.connections {
            Some(Full::Everyone)
        } else if of_caller >= self.per_caller {
            Some(Full::Caller)
        } else if in_handshake && taken.in_handshake >= self.connections.div_ceil(2) {
            Some(Full::Handshakes)
        } else {
            None
        };
        if let Some(full) = full {
            taken.refused += 1;
            return Err(full);
        }
        taken.open += 1;
        taken.in_handshake += usize::from(in_handshake);
        taken.callers.insert(caller, of_caller + 1);
        drop(taken);
        Ok(Place { taken: Arc::clone(&self.taken), caller, in_handshake })
    }
}

fn lock(taken: &Mutex<Taken>) -> MutexGuard<'_, Taken> {
    taken.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection's place; free again when it goes.
#[derive(Debug)]
pub(super) struct Place {
    taken: Arc<Mutex<Taken>>,
    caller: Caller,
    in_handshake: bool,
}

impl Place {
    /// The handshake is done.
    pub(super) fn shaken(mut self) -> Self {
        if self.in_handshake {
            lock(&self.taken).in_handshake -= 1;
            self.in_handshake = false;
        }
        self
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = lock(&self.taken);
        taken.open -= 1;
        taken.in_handshake -= usize::from(self.in_handshake);
        // A caller without connections is forgotten: strangers must not fill the memory.
        let left = taken.callers.get(&self.caller).map_or(0, |count| count.saturating_sub(1));
        match left {
            0 => taken.callers.remove(&self.caller),
            left => taken.callers.insert(self.caller, left),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Peer;

    fn places(connections: usize, connections_per_caller: usize) -> Places {
        Places::new(&Limits { connections, connections_per_caller, ..Limits::default() })
    }

    fn tcp(address: &str) -> ConnectionInfo {
        let source = SourceAddress::Tcp(address.parse().unwrap());
        ConnectionInfo { source, peer: None, certificate: None }
    }

    fn unix(uid: u32, pid: i32) -> ConnectionInfo {
        let peer = Some(Peer { uid, gid: 0, pid: Some(pid) });
        ConnectionInfo { source: SourceAddress::Unix { pid: Some(pid) }, peer, certificate: None }
    }

    #[test]
    fn one_caller_can_not_take_all_places() {
        let places = places(5, 2);
        let held = [
            places.take(&tcp("10.0.0.1:1"), false).unwrap(),
            places.take(&tcp("10.0.0.1:2"), false).unwrap(),
            places.take(&tcp("10.0.0.2:1"), false).unwrap(),
        ];
        assert_eq!(places.take(&tcp("10.0.0.1:3"), false).unwrap_err(), Full::Caller);
        assert_eq!(places.take(&tcp("[::ffff:10.0.0.1]:3"), false).unwrap_err(), Full::Caller);
        let _more = [places.take(&unix(7, 1), false).unwrap(), places.take(&unix(7, 2), false).unwrap()];
        assert_eq!(places.take(&unix(8, 3), false).unwrap_err(), Full::Everyone);
        assert_eq!((places.open(), places.refused()), (5, 3));
        drop(held);
        assert_eq!(places.take(&unix(7, 3), false).unwrap_err(), Full::Caller, "a uid is one caller");
        places.take(&tcp("10.0.0.1:4"), false).unwrap();
    }

    #[test]
    fn a_network_of_64_bits_is_one_caller() {
        let places = places(10, 1);
        let _one = places.take(&tcp("[2001:db8:0:1::1]:1"), false).unwrap();
        assert_eq!(places.take(&tcp("[2001:db8:0:1:ffff::2]:1"), false).unwrap_err(), Full::Caller);
        places.take(&tcp("[2001:db8:0:2::1]:1"), false).unwrap();
    }

    #[test]
    fn b25_handshakes_leave_room_for_others() {
        let places = places(4, 4);
        let first = places.take(&tcp("10.0.0.1:1"), true).unwrap();
        let second = places.take(&tcp("10.0.0.2:1"), true).unwrap();
        assert_eq!(places.take(&tcp("10.0.0.3:1"), true).unwrap_err(), Full::Handshakes);
        places.take(&unix(7, 1), false).unwrap();
        let first = first.shaken();
        let third = places.take(&tcp("10.0.0.3:1"), true).unwrap();
        drop((first, second, third));
        let taken = lock(&places.taken);
        assert_eq!((taken.open, taken.in_handshake, taken.callers.len()), (0, 0, 0));
    }

    #[test]
    fn ten_thousand_connections_leave_nothing_behind() {
        let places = places(10, 10);
        for port in 1..=10_000_u16 {
            let place = places.take(&tcp(&format!("10.0.{}.1:{port}", port % 200)), port % 2 == 0).unwrap();
            drop(if port % 3 == 0 { place.shaken() } else { place });
        }
        let taken = lock(&places.taken);
        assert_eq!((taken.open, taken.in_handshake, taken.callers.len(), taken.refused), (0, 0, 0, 0));
    }
}
