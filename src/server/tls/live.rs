//! Connections that stand on a client's certificate: known while they live, ended when it is no longer trusted.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use jiff::Timestamp;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use x509_parser::parse_x509_certificate;

use crate::identity::mtls::{ClientCertificate, instant};

/// Every live connection that stands on a client's certificate.
#[derive(Default)]
pub(super) struct Live {
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    next: u64,
    watched: HashMap<u64, Arc<Watched>>,
}

/// One of them.
pub(super) struct Watched {
    /// What the client presented, its own certificate first.
    pub(super) chain: Vec<CertificateDer<'static>>,
    /// The first end of any certificate in it.
    pub(super) soonest: Timestamp,
    ended: AtomicBool,
    /// Of the one task that drives the connection, whichever half of it waits.
    waker: AtomicWaker,
}

impl Live {
    /// Knows a connection until the returned watch goes.
    pub(super) fn watch(self: &Arc<Self>, chain: Vec<CertificateDer<'static>>) -> Watch {
        let soonest = chain.iter().filter_map(not_after).min().unwrap_or(Timestamp::MAX);
        let (ended, waker) = (AtomicBool::new(false), AtomicWaker::new());
        let watched = Arc::new(Watched { chain, soonest, ended, waker });
        let mut slots = self.slots();
        let number = slots.next;
        slots.next += 1;
        slots.watched.insert(number, Arc::clone(&watched));
        drop(slots);
        Watch { live: Arc::clone(self), number, watched }
    }

    pub(super) fn len(&self) -> usize {
        self.slots().watched.len()
    }

    /// Ends those that `may_stay` says no to, and gives their number. Verifying takes a while, so connections come
    /// and go meanwhile.
    pub(super) fn end_unless(&self, may_stay: impl Fn(&Watched) -> bool) -> usize {
        let mut ending: Vec<_> = self.slots().watched.values().cloned().collect();
        ending.retain(|watched| !may_stay(watched));
        ending.iter().for_each(|watched| watched.end());
        ending.len()
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn not_after(der: &CertificateDer<'static>) -> Option<Timestamp> {
    let (_, certificate) = parse_x509_certificate(der).ok()?;
    Some(instant(certificate.validity().not_after))
}

impl Watched {
    fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.waker.wake();
    }

    fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    fn poll_ended(&self, cx: &Context<'_>) -> Poll<()> {
        self.waker.register(cx.waker());
        // Looked at after the registration: an end in between would wake nobody.
        if self.is_ended() { Poll::Ready(()) } else { Poll::Pending }
    }
}

/// A connection's entry, taken out when it goes.
pub(super) struct Watch {
    live: Arc<Live>,
    number: u64,
    watched: Arc<Watched>,
}

impl Watch {
    pub(super) fn is_ended(&self) -> bool {
        self.watched.is_ended()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.live.slots().watched.remove(&self.number);
    }
}

/// A TLS connection past its handshake. Fails, in whatever it is doing, once its client is no longer trusted.
pub(in crate::server) struct Secured {
    stream: TlsStream<TcpStream>,
    watch: Option<Watch>,
    certificate: Option<Arc<ClientCertificate>>,
}

impl Secured {
    pub(super) fn anonymous(stream: TlsStream<TcpStream>) -> Self {
        Self { stream, watch: None, certificate: None }
    }

    pub(super) fn certified(
        stream: TlsStream<TcpStream>,
        watch: Watch,
        certificate: Option<Arc<ClientCertificate>>,
    ) -> Self {
        Self { stream, watch: Some(watch), certificate }
    }

    /// The client's certificate, where it presented one.
    pub(in crate::server) fn certificate(&self) -> Option<Arc<ClientCertificate>> {
        self.certificate.clone()
    }

    pub(super) fn chain(&self) -> Option<&[CertificateDer<'static>]> {
        self.watch.as_ref().map(|watch| watch.watched.chain.as_slice())
    }

    /// Does what `poll` does while the client is trusted; where it waits, the end of that is waited for as well.
    fn while_trusted<T>(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        poll: impl FnOnce(Pin<&mut TlsStream<TcpStream>>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if self.watch.as_ref().is_some_and(Watch::is_ended) {
            return Poll::Ready(Err(no_longer_trusted()));
        }
        let done = poll(Pin::new(&mut self.stream), cx);
        match &self.watch {
            Some(watch) if done.is_pending() => {
                watch.watched.poll_ended(cx).map(|()| Err(no_longer_trusted()))
            }
            _ => done,
        }
    }
}

fn no_longer_trusted() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the client's certificate is no longer trusted")
}

impl AsyncRead for Secured {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.while_trusted(cx, |stream, cx| stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for Secured {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.while_trusted(cx, |stream, cx| stream.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.while_trusted(cx, |stream, cx| stream.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.while_trusted(cx, |stream, cx| stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.while_trusted(cx, |stream, cx| stream.poll_shutdown(cx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::task::noop_waker;
    use std::sync::atomic::AtomicUsize;
    use std::task::{Wake, Waker};

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn chain(name: &[u8]) -> Vec<CertificateDer<'static>> {
        vec![CertificateDer::from(name.to_vec())]
    }

    #[test]
    fn b24_an_idle_connection_is_woken_when_its_trust_ends_and_others_are_not() {
        let live = Arc::new(Live::default());
        let (gone, stays) = (live.watch(chain(b"gone")), live.watch(chain(b"stays")));
        let (woken, left) = (Arc::new(Count::default()), Arc::new(Count::default()));
        let wakers = [Waker::from(Arc::clone(&woken)), Waker::from(Arc::clone(&left))];
        assert!(gone.watched.poll_ended(&Context::from_waker(&wakers[0])).is_pending());
        assert!(stays.watched.poll_ended(&Context::from_waker(&wakers[1])).is_pending());
        assert_eq!(live.end_unless(|watched| watched.chain == chain(b"stays")), 1);
        assert_eq!((woken.0.load(Ordering::SeqCst), left.0.load(Ordering::SeqCst)), (1, 0));
        assert!(gone.is_ended() && !stays.is_ended());
        assert!(gone.watched.poll_ended(&Context::from_waker(&noop_waker())).is_ready());
    }

    #[test]
    fn ten_thousand_connections_leave_nothing_behind() {
        let live = Arc::new(Live::default());
        let first = live.watch(chain(b"first"));
        for _ in 0..10_000 {
            drop(live.watch(chain(b"another")));
        }
        assert_eq!((live.len(), Arc::strong_count(&live)), (1, 2));
        drop(first);
        assert_eq!((live.len(), Arc::strong_count(&live)), (0, 1));
    }
}
