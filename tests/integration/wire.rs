//! What a stranger, or a broken program, can send over the wire.

use std::io::{Read as _, Write as _};

use bytes::Bytes;
use claviger::proto::v1;
use claviger::proto::v1::audit_service_client::AuditServiceClient;
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use prost::Message as _;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_types::StatusExt as _;
use tower::ServiceExt as _;

use crate::support::program::{Program, claviger};
use crate::support::{channel, secrets};

fn reason(status: &Status) -> String {
    status.get_details_error_info().expect("every error has its reason").reason
}

fn get(environment: &str, name: &str) -> v1::GetSecretRequest {
    v1::GetSecretRequest { environment: environment.to_owned(), name: name.to_owned(), ..Default::default() }
}

/// A broker on a socket and on TCP, with the TCP address.
fn with_tcp(folder: &std::path::Path) -> (Program, String) {
    let socket = folder.join("dev.sock");
    let data = folder.join("data");
    let mut command = claviger(["dev", "--listen", "127.0.0.1:0"]);
    command.arg("--data").arg(&data).arg("--socket").arg(&socket);
    let program = Program::start(command, socket);
    program.wait_for_log("listening on http://");
    let log = program.log();
    let line = log.lines().find(|line| line.contains("listening on http://")).unwrap();
    let address = line.split_whitespace().find(|word| word.starts_with("http://")).unwrap().to_owned();
    (program, address)
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_get_their_reason_and_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let mut client = secrets(&program.socket).await;
    for (environment, name, expected) in [
        ("", "database", "INVALID_ENVIRONMENT"),
        ("Production", "database", "INVALID_ENVIRONMENT"),
        ("рrod", "database", "INVALID_ENVIRONMENT"),
        ("claviger", "database", "INVALID_ENVIRONMENT"),
        ("development", "", "INVALID_NAME"),
        ("development", "   ", "INVALID_NAME"),
        ("development", "../prod/db", "INVALID_NAME"),
        ("development", "dev/../prod", "INVALID_NAME"),
        ("development", "a//b", "INVALID_NAME"),
        ("development", "a/", "INVALID_NAME"),
        ("development", "a\0b", "INVALID_NAME"),
        ("development", "a\nb", "INVALID_NAME"),
        ("development", "_internal/x", "INVALID_NAME"),
        ("development", "missing", "SECRET_NOT_FOUND"),
    ] {
        let status = client.get_secret(get(environment, name)).await.unwrap_err();
        assert_eq!(reason(&status), expected, "{environment:?} {name:?}: {status}");
        assert!(!status.message().contains('\n'));
    }
    let field = v1::GetSecretRequest { field: "nope".to_owned(), ..get("development", "database") };
    assert_eq!(reason(&client.get_secret(field).await.unwrap_err()), "FIELD_NOT_FOUND");
    let selector = |selector| Some(v1::Selector { selector: Some(selector) });
    let foreign = v1::selector::Selector::VersionId("11111111-1111-4111-8111-111111111111".to_owned());
    let request = v1::GetSecretRequest { selector: selector(foreign), ..get("development", "database") };
    assert_eq!(reason(&client.get_secret(request).await.unwrap_err()), "VERSION_NOT_FOUND");
    let label = v1::selector::Selector::Label("AWSNOPE".to_owned());
    let request = v1::GetSecretRequest { selector: selector(label), ..get("development", "database") };
    assert_eq!(reason(&client.get_secret(request).await.unwrap_err()), "INVALID_LABEL");
    let request = v1::GetSecretRequest { reason: "x".repeat(513), ..get("development", "database") };
    assert_eq!(reason(&client.get_secret(request).await.unwrap_err()), "INVALID_ARGUMENT");
    let request = v1::GetSecretRequest { approval_id: "a-1".to_owned(), ..get("development", "database") };
    assert_eq!(client.get_secret(request).await.unwrap_err().code(), Code::Unimplemented);

    let put = v1::PutSecretRequest {
        environment: "development".to_owned(),
        name: "new".to_owned(),
        payload: Some(v1::SecretPayload { data: "v".into(), content_type: 1 }),
        client_request_token: "0".repeat(32),
        ..Default::default()
    };
    for (bad, expected) in [
        (v1::PutSecretRequest { payload: None, ..put.clone() }, "INVALID_ARGUMENT"),
        (v1::PutSecretRequest { client_request_token: String::new(), ..put.clone() }, "INVALID_VERSION_ID"),
        (v1::PutSecretRequest { labels: vec!["AWSPREVIOUS".to_owned()], ..put.clone() }, "INVALID_LABEL"),
        (
            v1::PutSecretRequest {
                payload: Some(v1::SecretPayload { data: "v".into(), content_type: 999 }),
                ..put.clone()
            },
            "INVALID_ARGUMENT",
        ),
        (
            v1::PutSecretRequest {
                payload: Some(v1::SecretPayload { data: vec![0xff].into(), content_type: 1 }),
                ..put.clone()
            },
            "INVALID_VALUE",
        ),
        (
            v1::PutSecretRequest {
                payload: Some(v1::SecretPayload { data: vec![b'x'; 65_537].into(), content_type: 1 }),
                ..put.clone()
            },
            "VALUE_TOO_LARGE",
        ),
        (
            v1::PutSecretRequest {
                payload: Some(v1::SecretPayload { data: "".into(), content_type: 1 }),
                ..put.clone()
            },
            "VALUE_EMPTY",
        ),
    ] {
        let status = client.put_secret(bad).await.unwrap_err();
        assert_eq!(reason(&status), expected, "{status}");
    }
    let status = client.get_secret(get("development", "new")).await.unwrap_err();
    assert_eq!(reason(&status), "SECRET_NOT_FOUND", "nothing was written");
    let largest = vec![b'x'; 65_536];
    let largest = v1::PutSecretRequest {
        payload: Some(v1::SecretPayload { data: largest.into(), content_type: 1 }),
        ..put
    };
    client.put_secret(largest).await.unwrap();

    // Everything that the caller was told, the log was told too.
    let query = v1::QueryRequest { outcome: "failed".to_owned(), limit: 1_000, ..Default::default() };
    let mut audit = AuditServiceClient::new(channel(&program.socket).await);
    let lines = audit.query(query).await.unwrap().into_inner().lines;
    assert!(lines.iter().any(|line| line.contains("INVALID_NAME")));
    assert!(lines.iter().any(|line| line.contains("VALUE_TOO_LARGE")));
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_have_bounds_and_a_result_for_each_item() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let mut client = secrets(&program.socket).await;
    let query = |name: &str| v1::SecretQuery {
        environment: "development".to_owned(),
        name: name.to_owned(),
        ..Default::default()
    };
    for count in [0, 501] {
        let request = v1::BatchGetSecretsRequest { items: vec![query("jwt"); count], ..Default::default() };
        assert_eq!(
            reason(&client.batch_get_secrets(request).await.unwrap_err()),
            "INVALID_ARGUMENT",
            "{count}"
        );
    }
    let items = vec![query("jwt"), query("a//b"), query("jwt"), query("missing")];
    let request = v1::BatchGetSecretsRequest { items, ..Default::default() };
    let results = client.batch_get_secrets(request).await.unwrap().into_inner().results;
    let told: Vec<_> = results
        .into_iter()
        .map(|result| match result.result.unwrap() {
            v1::batch_get_secrets_result::Result::Secret(secret) => secret.name,
            v1::batch_get_secrets_result::Result::Problem(problem) => problem.reason,
        })
        .collect();
    assert_eq!(told, ["jwt", "INVALID_NAME", "jwt", "SECRET_NOT_FOUND"]);
    let request = v1::BatchGetSecretsRequest { items: vec![query("jwt"); 500], ..Default::default() };
    assert_eq!(client.batch_get_secrets(request).await.unwrap().into_inner().results.len(), 500);
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_over_tcp_see_health_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let (program, address) = with_tcp(folder.path());
    let tcp = tonic::transport::Channel::from_shared(address.clone()).unwrap().connect().await.unwrap();

    let health =
        HealthClient::new(tcp.clone()).check(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(health.status(), ServingStatus::Serving);

    let mut client = v1::secret_service_client::SecretServiceClient::new(tcp.clone());
    let status = client.get_secret(get("development", "database")).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unauthenticated, "UNAUTHENTICATED"));
    let ask = || {
        let list = ServerReflectionRequest {
            message_request: Some(MessageRequest::ListServices(String::new())),
            ..Default::default()
        };
        tonic::Request::new(tokio_stream::iter([list]))
    };
    let status = ServerReflectionClient::new(tcp.clone()).server_reflection_info(ask()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    let mut known = ServerReflectionClient::new(channel(&program.socket).await);
    known.server_reflection_info(ask()).await.expect("reflection is there for whom the broker knows");

    // An invalid credential is not made good by a stronger one beside it.
    let mut over_socket = secrets(&program.socket).await;
    for header in ["Bearer clv_0000000000000000_x", "Bearer", "Basic YTpi", "Bearer  "] {
        let mut request = tonic::Request::new(get("development", "database"));
        request.metadata_mut().insert("authorization", header.parse().unwrap());
        let status = over_socket.get_secret(request).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{header}");
    }

    // What is not gRPC is turned away, and the broker lives on.
    for rubbish in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], b"\x16\x03\x01\x02\x00", &[0; 512]] {
        let mut stream = std::net::TcpStream::connect(address.strip_prefix("http://").unwrap()).unwrap();
        // The broker may have closed the connection already: it owes rubbish nothing.
        let _ = stream.write_all(rubbish);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(!String::from_utf8_lossy(&answer).contains("200 OK"));
    }
    let health = HealthClient::new(tcp).check(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(health.status(), ServingStatus::Serving);
}

#[tokio::test(flavor = "multi_thread")]
async fn sizes_are_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let mut client = secrets(&program.socket).await;
    let huge = v1::GetSecretRequest { field: "x".repeat(5 * 1024 * 1024), ..get("development", "database") };
    let status = client.get_secret(huge).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    client.get_secret(get("development", "database")).await.expect("the connection lives on");
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_of_ones_own_move_and_the_systems_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::dev(folder.path());
    let mut client = secrets(&program.socket).await;
    let current = client.get_secret(get("development", "jwt")).await.unwrap().into_inner().secret.unwrap();
    let request = |label: &str, from: &str| v1::MoveLabelRequest {
        environment: "development".to_owned(),
        name: "jwt".to_owned(),
        label: label.to_owned(),
        from_version_id: from.to_owned(),
        to_version_id: current.version_id.clone(),
        ..Default::default()
    };
    assert!(client.move_label(request("stable", "")).await.unwrap().into_inner().changed);
    assert!(
        !client.move_label(request("stable", "")).await.unwrap().into_inner().changed,
        "a retry is harmless"
    );
    let elsewhere = "00000000-0000-4000-8000-000000000000";
    let stale = v1::MoveLabelRequest { to_version_id: String::new(), ..request("stable", elsewhere) };
    assert_eq!(reason(&client.move_label(stale).await.unwrap_err()), "CONFLICT");
    for label in ["AWSCURRENT", "AWSPENDING", "AWSPREVIOUS", "AWSX"] {
        let status = client.move_label(request(label, "")).await.unwrap_err();
        assert_eq!(reason(&status), "INVALID_LABEL", "{label}");
    }
    let selector = v1::selector::Selector::Label("stable".to_owned());
    let by_label = v1::GetSecretRequest {
        selector: Some(v1::Selector { selector: Some(selector) }),
        ..get("development", "jwt")
    };
    let found = client.get_secret(by_label).await.unwrap().into_inner().secret.unwrap();
    assert_eq!(found.version_id, current.version_id);
}

#[tokio::test(flavor = "multi_thread")]
async fn b30_a_connection_that_never_ends_does_not_keep_the_broker() {
    use crate::support::assembled;
    use claviger::server::{Limits, Listen};
    use std::time::Duration;
    use tokio::io::AsyncWriteExt as _;

    let folder = tempfile::tempdir().unwrap();
    let running = assembled::start(&assembled::resolved(folder.path()), assembled::clock()).await.unwrap();
    let path = folder.path().join("s.sock");
    let door = Listen::Unix { path: path.clone(), mode: 0o600 }.bind().await.unwrap();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let limits = Limits { drain: Duration::from_millis(50), ..Limits::default() };
    let serving = tokio::spawn(running.serve(vec![door], limits, stopped));
    let mut stuck = tokio::net::UnixStream::connect(&path).await.unwrap();
    // The preface, and half of a frame that never comes.
    stuck.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x10").await.unwrap();
    stop.send(true).unwrap();
    tokio::time::timeout(Duration::from_secs(60), serving).await.expect("a hard end").unwrap().unwrap();
    let records = assembled::records(folder.path());
    assert_eq!(records.iter().rev().nth(1).unwrap()["kind"], "shutdown");
}

/// What a call with this body comes to: its code and reason, and how many bytes of messages there were.
async fn called(channel: &Channel, token: &str, kind: &str, frames: &[&[u8]]) -> (String, String, usize) {
    let frames: Vec<_> = frames.iter().map(|frame| Ok(Frame::data(Bytes::copy_from_slice(frame)))).collect();
    let body = StreamBody::new(futures_util::stream::iter::<Vec<Result<_, Status>>>(frames));
    let request = http::Request::post("/claviger.v1.SecretService/GetSecret")
        .header("content-type", kind)
        .header("te", "trailers")
        .header("authorization", format!("Bearer {token}"))
        .body(tonic::body::Body::new(body))
        .unwrap();
    let response = channel.clone().oneshot(request).await.unwrap();
    assert!(response.headers().contains_key("x-request-id"));
    let (head, body) = response.into_parts();
    let collected = body.collect().await.unwrap();
    let trailers = collected.trailers().cloned().unwrap_or_default();
    let bytes = collected.to_bytes().len();
    let said = Status::from_header_map(&head.headers).or_else(|| Status::from_header_map(&trailers)).unwrap();
    let reason = said.get_details_error_info().map(|info| info.reason).unwrap_or_default();
    (format!("{:?}", said.code()), reason, bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_is_answered_alike_whichever_way_it_takes() {
    let folder = tempfile::tempdir().unwrap();
    let (program, address) = with_tcp(folder.path());
    let token = program
        .ok(["token", "create", "--user", "ana", "--group", "team", "--expires", "1h"])
        .trim()
        .to_owned();
    let channel = Channel::from_shared(address).unwrap().connect().await.unwrap();
    let framed = |compressed: u8, message: &[u8]| {
        let length = u32::try_from(message.len()).unwrap().to_be_bytes();
        [&[compressed][..], &length, message].concat()
    };
    let good = framed(0, &get("development", "database").encode_to_vec());
    let missing = framed(0, &get("development", "missing").encode_to_vec());
    let senseless = framed(0, &get("Development", "database").encode_to_vec());
    let large = v1::GetSecretRequest { reason: "x".repeat(2 << 20), ..get("development", "database") };
    let large = framed(0, &large.encode_to_vec());
    let bytewise: Vec<&[u8]> = good.chunks(1).collect();
    let cases: Vec<(&str, Vec<&[u8]>)> = vec![
        ("one frame", vec![&good]),
        ("many frames", bytewise),
        ("an empty frame before", vec![b"", &good]),
        ("an empty frame behind", vec![&good, b""]),
        ("absent", vec![&missing]),
        ("senseless", vec![&senseless]),
        ("nothing", vec![]),
        ("half a message", vec![good.split_at(good.len() / 2).0]),
        ("a compressed one", { vec![Box::leak(framed(1, b"\x1f\x8b").into_boxed_slice())] }),
        ("no protobuf", vec![Box::leak(framed(0, &[0xff; 9]).into_boxed_slice())]),
        ("too large", vec![&large]),
    ];
    for (name, frames) in cases {
        let by_hand = called(&channel, &token, "application/grpc", &frames).await;
        // A kind that the fast way does not know, and that the library takes for its own.
        let usual = called(&channel, &token, "application/grpc+other", &frames).await;
        // A value's age, and so the length of the message, differs from call to call.
        assert_eq!((&by_hand.0, &by_hand.1), (&usual.0, &usual.1), "{name}");
        assert!(by_hand.2.abs_diff(usual.2) < 12, "{name}: {} and {} bytes", by_hand.2, usual.2);
    }
}
