//! HTTP/2 connections, and the way of each call from its frames to its answer.
//!
//! ```text
//! connection, a task ─▶ HTTP/2 ─▶ call, a task ─▶ door ─┬─ GetSecret ─▶ read.rs ──────────────▶ Reply
//!                                                       └─ all others ▶ tonic's routes ▶ service ─▶ Reply
//! ```
//!
//! The library's own server puts eight layers and a router between a connection and its services, and gives each reply
//! eight kilobytes to be written in. All of that is paid for by each call, so it is not used here: its services are, by
//! all calls but the one that nearly all calls are.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::sync::watch;
use tonic::Status;
use tonic::service::Routes;

use super::door::Door;
use crate::server::Limits;
use crate::server::listen::{Accepted, ConnectionInfo};
use crate::server::told;

/// A connection whose other end is gone is found within the sum of these, whether or not a call is under way.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(20);
const KEEPALIVE_WITHIN: Duration = Duration::from_secs(10);
/// How many streams a caller may open and reset before they were looked at (CVE-2023-44487), and how many this side may
/// have to reset for the caller's errors; one more ends the connection.
const MOST_RESETS: usize = 20;
const MOST_ERRORS: usize = 1_024;
/// The longest header list that is taken, and the largest frame, in bytes.
const HEADERS: u32 = 16 * 1_024;
const FRAME: u32 = 16 * 1_024;
/// How much of request messages may be on its way before it is asked for: of one call, and of all on a connection.
/// RFC 9113's own 64 KiB would have a batch of long names wait for a round trip.
const CALL_WINDOW: u32 = 256 * 1_024;
const CONNECTION_WINDOW: u32 = 1_024 * 1_024;

/// What serves connections.
#[derive(Clone)]
pub(in crate::server) struct Transport {
    door: Door,
    routes: Routes,
    http: http2::Builder<TokioExecutor>,
}

impl Transport {
    pub(super) fn new(door: Door, routes: Routes, limits: &Limits) -> Self {
        let mut http = http2::Builder::new(TokioExecutor::new());
        http.timer(TokioTimer::new())
            .max_concurrent_streams(limits.streams)
            .keep_alive_interval(KEEPALIVE_EVERY)
            .keep_alive_timeout(KEEPALIVE_WITHIN)
            .max_header_list_size(HEADERS)
            .max_pending_accept_reset_streams(MOST_RESETS)
            .max_local_error_reset_streams(MOST_ERRORS)
            .max_frame_size(FRAME)
            .initial_stream_window_size(CALL_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            // gRPC has no use for a date.
            .auto_date_header(false);
        Self { door, routes: routes.prepare(), http }
    }

    /// Serves a connection to its end, which it is asked to come to when `shutdown` says true.
    pub(in crate::server) async fn serve(self, accepted: Accepted, shutdown: watch::Receiver<bool>) {
        let begun = tokio::select! {
            begun = accepted.begin() => begun,
            () = told(shutdown.clone()) => None,
        };
        let Some(connection) = begun else { return };
        let Self { door, routes, http } = self;
        let info = Arc::new(connection.info().clone());
        let calls = Calls { door, routes, info };
        let mut serving = std::pin::pin!(http.serve_connection(TokioIo::new(connection), calls));
        let ended = tokio::select! {
            biased;
            ended = &mut serving => ended,
            () = told(shutdown) => {
                serving.as_mut().graceful_shutdown();
                serving.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection ended in an error");
        }
    }
}

/// The calls of one connection.
struct Calls {
    door: Door,
    routes: Routes,
    info: Arc<ConnectionInfo>,
}

impl hyper::service::Service<Request<Incoming>> for Calls {
    type Response = Response<Reply>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Reply>, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let Self { door, routes, info } = self;
        let call = door.clone().call(routes.clone(), request, Arc::clone(info));
        Box::pin(async move { Ok(call.await) })
    }
}

/// What is sent for a call.
pub(super) enum Reply {
    /// One message, and that the call went well.
    One(Option<Bytes>),
    /// That it went well, and nothing more.
    Trailers,
    /// It is all said.
    End,
    /// Whatever a service says.
    Other(tonic::body::Body),
}

impl Reply {
    pub(super) const fn one(message: Bytes) -> Self {
        Self::One(Some(message))
    }
}

impl http_body::Body for Reply {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let reply = self.get_mut();
        match reply {
            Self::One(message) => {
                let message = message.take().unwrap_or_default();
                *reply = Self::Trailers;
                Poll::Ready(Some(Ok(Frame::data(message))))
            }
            Self::Trailers => {
                *reply = Self::End;
                let mut trailers = HeaderMap::with_capacity(1);
                trailers.insert("grpc-status", HeaderValue::from_static("0"));
                Poll::Ready(Some(Ok(Frame::trailers(trailers))))
            }
            Self::End => Poll::Ready(None),
            Self::Other(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::One(_) | Self::Trailers => false,
            Self::End => true,
            Self::Other(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Other(body) => body.size_hint(),
            Self::One(_) | Self::Trailers | Self::End => SizeHint::default(),
        }
    }
}
