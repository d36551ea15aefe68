//! Places for connections: so many over all listeners, and so many for one caller. Those that come over the network
//! leave some to Unix sockets, and those of them that nobody is known to be on leave half to the others.
//!
//! ```text
//! connections
//! ├──────────── the network's ────────────┼─ Unix sockets' alone ─┤   16, and at least one in 16
//! ├─ half: unknown ──┼─── known only ─────┤
//! ```
//!
//! Known are: who comes over a Unix socket, because the kernel says who it is; who presents a certificate that the
//! handshake verified; and whose first call was authenticated. All others can take no more than the share of the
//! unknown, however many they are, and keep a place of it only for a while.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::identity::{Peer, SourceAddress};
use crate::server::Limits;

/// The places, shared by all listeners.
#[derive(Debug, Clone)]
pub struct Places {
    connections: usize,
    network: usize,
    per_caller: usize,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Debug, Default)]
struct Taken {
    open: usize,
    network: usize,
    unknown: usize,
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
    fn of(source: &SourceAddress, peer: Option<Peer>) -> Self {
        match (peer, source) {
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
    Network,
    Unknown,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Everyone => "the bound on connections is reached",
            Self::Caller => "the bound on connections of one caller is reached",
            Self::Network => "the network's places are all taken; the rest is for Unix sockets",
            Self::Unknown => {
                "half of the network's places are taken by connections that nobody is known to be on"
            }
        })
    }
}

impl Places {
    /// The places that the limits give.
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        let (connections, per_caller) = (limits.connections, limits.connections_per_caller);
        let network = connections.saturating_sub((connections / 16).max(16)).max(1);
        Self { connections, network, per_caller, taken: Arc::default() }
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

    /// A place, until it is dropped. Over the network it is that of a stranger, until its standing says otherwise.
    pub(super) fn take(&self, source: &SourceAddress, peer: Option<Peer>) -> Result<Place, Full> {
        let caller = Caller::of(source, peer);
        let over_network = peer.is_none();
        let mut taken = lock(&self.taken);
        let of_caller = taken.callers.get(&caller).copied().unwrap_or(0);
        let full = if taken.open >= self.connections {
            Some(Full::Everyone)
        } else if of_caller >= self.per_caller {
            Some(Full::Caller)
        } else if over_network && taken.network >= self.network {
            Some(Full::Network)
        } else if over_network && taken.unknown >= self.network.div_ceil(2) {
            Some(Full::Unknown)
        } else {
            None
        };
        if let Some(full) = full {
            taken.refused += 1;
            return Err(full);
        }
        taken.open += 1;
        taken.network += usize::from(over_network);
        taken.unknown += usize::from(over_network);
        taken.callers.insert(caller, of_caller + 1);
        drop(taken);
        Ok(Place { caller, over_network, standing: Arc::new(Standing::new(&self.taken, over_network)) })
    }
}

fn lock(taken: &Mutex<Taken>) -> MutexGuard<'_, Taken> {
    taken.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether it is known who is on a connection. Its place and every call on it share this.
#[derive(Debug)]
pub(super) struct Standing {
    taken: Arc<Mutex<Taken>>,
    unknown: AtomicBool,
    renewed: AtomicBool,
}

impl Standing {
    fn new(taken: &Arc<Mutex<Taken>>, unknown: bool) -> Self {
        let (unknown, renewed) = (AtomicBool::new(unknown), AtomicBool::new(false));
        Self { taken: Arc::clone(taken), unknown, renewed }
    }

    pub(super) fn is_known(&self) -> bool {
        !self.unknown.load(Ordering::Acquire)
    }

    /// From now on it is known: gives back, once, what the connection has of the share of the unknown.
    pub(super) fn known(&self) {
        // Looked at first: this is asked with every call, and the answer changes once.
        if !self.is_known() && self.unknown.swap(false, Ordering::AcqRel) {
            lock(&self.taken).unknown -= 1;
        }
    }

    /// An unknown connection asked for what is open to everyone.
    pub(super) fn renew(&self) {
        self.renewed.store(true, Ordering::Relaxed);
    }

    /// Whether there was a reason, since this was last asked, to let the connection be.
    pub(super) fn may_stay(&self) -> bool {
        self.is_known() || self.renewed.swap(false, Ordering::Relaxed)
    }
}

/// A connection's place; free again when it goes.
#[derive(Debug)]
pub(super) struct Place {
    caller: Caller,
    over_network: bool,
    standing: Arc<Standing>,
}

impl Place {
    pub(super) const fn standing(&self) -> &Arc<Standing> {
        &self.standing
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // A call may outlive its connection; what it says of it then counts no more.
        self.standing.known();
        let mut taken = lock(&self.standing.taken);
        taken.open -= 1;
        taken.network -= usize::from(self.over_network);
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

    fn places(connections: usize, connections_per_caller: usize) -> Places {
        Places::new(&Limits { connections, connections_per_caller, ..Limits::default() })
    }

    impl Places {
        fn tcp(&self, address: &str) -> Result<Place, Full> {
            self.take(&SourceAddress::Tcp(address.parse().unwrap()), None)
        }

        fn unix(&self, uid: u32) -> Result<Place, Full> {
            let peer = Peer { uid, gid: 0, pid: Some(1) };
            self.take(&SourceAddress::Unix { pid: peer.pid }, Some(peer))
        }

        /// Open, over the network, unknown, callers.
        fn counts(&self) -> (usize, usize, usize, usize) {
            let taken = lock(&self.taken);
            (taken.open, taken.network, taken.unknown, taken.callers.len())
        }
    }

    fn known(place: Place) -> Place {
        place.standing().known();
        place
    }

    #[test]
    fn one_caller_can_not_take_all_places() {
        let places = places(22, 2);
        let held = [
            known(places.tcp("10.0.0.1:1").unwrap()),
            known(places.tcp("10.0.0.1:2").unwrap()),
            known(places.tcp("10.0.0.2:1").unwrap()),
        ];
        assert_eq!(places.tcp("10.0.0.1:3").unwrap_err(), Full::Caller);
        assert_eq!(places.tcp("[::ffff:10.0.0.1]:3").unwrap_err(), Full::Caller);
        let _more = [places.unix(7).unwrap(), places.unix(7).unwrap()];
        let _others: Vec<_> = (100..117).map(|uid| places.unix(uid).unwrap()).collect();
        assert_eq!(places.unix(8).unwrap_err(), Full::Everyone);
        assert_eq!((places.open(), places.refused()), (22, 3));
        drop(held);
        assert_eq!(places.unix(7).unwrap_err(), Full::Caller, "a uid is one caller");
        places.tcp("10.0.0.1:4").unwrap();
    }

    #[test]
    fn a_network_of_64_bits_is_one_caller() {
        let places = places(40, 1);
        let _one = places.tcp("[2001:db8:0:1::1]:1").unwrap();
        assert_eq!(places.tcp("[2001:db8:0:1:ffff::2]:1").unwrap_err(), Full::Caller);
        places.tcp("[2001:db8:0:2::1]:1").unwrap();
    }

    #[test]
    fn b25_strangers_leave_room_for_whom_somebody_knows() {
        let places = places(20, 4);
        let first = places.tcp("10.0.0.1:1").unwrap();
        let second = places.tcp("10.0.0.2:1").unwrap();
        assert_eq!(places.tcp("10.0.0.3:1").unwrap_err(), Full::Unknown);
        places.unix(7).unwrap();
        first.standing().renew();
        assert!(first.standing().may_stay() && !first.standing().may_stay(), "a reason counts once");
        assert_eq!(places.tcp("10.0.0.3:1").unwrap_err(), Full::Unknown, "a renewal frees nothing");
        let first = known(known(first));
        assert!(first.standing().may_stay() && first.standing().may_stay());
        assert_eq!(places.counts(), (2, 2, 1, 2));
        let third = places.tcp("10.0.0.3:1").unwrap();
        let outlives = Arc::clone(third.standing());
        drop((first, second, third));
        outlives.known();
        assert_eq!(places.counts(), (0, 0, 0, 0));
    }

    #[test]
    fn b25_the_network_leaves_places_to_unix_sockets() {
        for (connections, network) in [(1, 1), (4, 1), (17, 1), (20, 4), (256, 240), (1_024, 960)] {
            let places = places(connections, usize::MAX);
            let held: Vec<_> = (0..network).map(|_| known(places.tcp("10.0.0.1:1").unwrap())).collect();
            let full = places.tcp("10.0.0.1:1").unwrap_err();
            assert_eq!(full, if connections == 1 { Full::Everyone } else { Full::Network }, "{connections}");
            let local: Vec<_> = (network..connections).map(|_| places.unix(7).unwrap()).collect();
            assert_eq!(places.unix(7).unwrap_err(), Full::Everyone, "{connections}");
            drop((held, local));
            assert_eq!(places.counts(), (0, 0, 0, 0));
        }
    }

    #[test]
    fn ten_thousand_connections_leave_nothing_behind() {
        let places = places(20, 10);
        for port in 1..=10_000_u16 {
            let place = match port % 2 {
                0 => places.unix(u32::from(port)).unwrap(),
                _ => places.tcp(&format!("10.0.{}.1:{port}", port % 200)).unwrap(),
            };
            drop(if port % 3 == 0 { known(place) } else { place });
        }
        assert_eq!((places.counts(), places.refused()), ((0, 0, 0, 0), 0));
    }
}
