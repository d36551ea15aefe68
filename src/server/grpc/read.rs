//! `GetSecret` without the library's layers: the call that nearly all calls are.
//!
//! INVARIANT: whatever is not exactly one whole, plain message is put together again and goes the way of all other calls,
//! so that no answer differs but in what it costs.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf as _, Bytes, BytesMut};
use http::{HeaderValue, Method, Request, Response, header};
use http_body::{Body as _, Frame};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use prost::Message as _;
use tonic::Status;

use super::door::Caller;
use super::transport::Reply;
use super::{secrets, wire};
use crate::broker::Broker;
use crate::proto::v1;

const PATH: &str = "/claviger.v1.SecretService/GetSecret";

/// Whether a request is one for this file, going by its headers.
pub(super) fn is_read(request: &Request<Incoming>) -> bool {
    let headers = request.headers();
    let plain =
        |kind: &HeaderValue| matches!(kind.as_bytes(), b"application/grpc" | b"application/grpc+proto");
    request.method() == Method::POST
        && request.uri().path() == PATH
        && headers.get(header::CONTENT_TYPE).is_some_and(plain)
        && headers.get("grpc-encoding").is_none_or(|encoding| encoding == "identity")
}

/// What a request's body holds.
pub(super) enum Body {
    /// Exactly one message.
    Message(v1::GetSecretRequest),
    /// Anything else, with what was read of it in front.
    Other(Rejoined),
}

/// Reads a body of no more than `most` bytes.
pub(super) async fn read(mut body: Incoming, most: usize) -> Body {
    let Some(first) = next(&mut body).await else {
        return Body::Other(Rejoined { before: None, rest: body });
    };
    // Nearly always the first frame is all there is.
    let whole = if body.is_end_stream() {
        first
    } else {
        let mut joined = BytesMut::from(first);
        while joined.len() <= most + wire::PREFIX && !body.is_end_stream() {
            match next(&mut body).await {
                Some(more) => joined.extend_from_slice(&more),
                None => break,
            }
        }
        joined.freeze()
    };
    match message(whole.clone(), most) {
        Some(message) if body.is_end_stream() => Body::Message(message),
        _ => Body::Other(Rejoined { before: Some(whole), rest: body }),
    }
}

/// The data of the next frame; `None` at the end, or where there is something else.
async fn next(body: &mut Incoming) -> Option<Bytes> {
    body.frame().await?.ok()?.into_data().ok()
}

/// The message of a body that is one, not compressed and no longer than permitted.
fn message(mut body: Bytes, most: usize) -> Option<v1::GetSecretRequest> {
    let (compressed, length) = (body.try_get_u8().ok()?, body.try_get_u32().ok()?);
    let whole = usize::try_from(length).ok() == Some(body.len()) && body.len() <= most;
    if compressed == 0 && whole { v1::GetSecretRequest::decode(body).ok() } else { None }
}

/// Answers one read.
pub(super) async fn answer(
    broker: &Broker,
    caller: &Caller,
    message: v1::GetSecretRequest,
) -> Result<Response<Reply>, Status> {
    let disclosed = secrets::disclose(broker, caller, message).await?;
    let mut response = Response::new(Reply::one(wire::reply(&disclosed)));
    response.headers_mut().reserve(2);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    Ok(response)
}

/// A body of which something was read.
pub(super) struct Rejoined {
    before: Option<Bytes>,
    rest: Incoming,
}

impl http_body::Body for Rejoined {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.before.take() {
            Some(before) => Poll::Ready(Some(Ok(Frame::data(before)))),
            None => Pin::new(&mut self.rest).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.before.is_none() && self.rest.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(compressed: u8, length: u32, body: &[u8]) -> Bytes {
        Bytes::from([&[compressed][..], &length.to_be_bytes(), body].concat())
    }

    #[test]
    fn one_whole_plain_message_is_taken_and_nothing_else() {
        let asked = v1::GetSecretRequest { environment: "production".to_owned(), ..Default::default() };
        let body = asked.encode_to_vec();
        let length = u32::try_from(body.len()).unwrap();
        assert_eq!(message(framed(0, length, &body), 100).unwrap().environment, "production");
        assert_eq!(message(framed(0, length, &body), body.len()).unwrap().environment, "production");
        assert!(message(framed(0, 0, &[]), 100).is_some(), "a message may be empty");
        for (other, most) in [
            (framed(1, length, &body), 100),
            (framed(0, length + 1, &body), 100),
            (framed(0, length - 1, &body), 100),
            (framed(0, length, &body), body.len() - 1),
            (framed(0, 2, &[0xff, 0xff]), 100),
            (Bytes::from_static(&[0, 0, 0]), 100),
            (Bytes::new(), 100),
        ] {
            assert!(message(other.clone(), most).is_none(), "{other:?}");
        }
    }
}
