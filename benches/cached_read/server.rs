//! The servers that the reads are put to: a bare echo, and the broker as it ships. Each is a process of its own, on one
//! current-thread runtime.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use claviger::broker::Call;
use claviger::clock::SystemClock;
use claviger::config::assembly::Running;
use claviger::config::{Resolved, RootKeyChoice};
use claviger::environment::{Durability, Environment, Registry};
use claviger::identity::token::TokenRequest;
use claviger::identity::{Principal, PrincipalKind};
use claviger::policy::PolicySource;
use claviger::proto::v1;
use claviger::proto::v1::secret_service_server::{SecretService, SecretServiceServer};
use claviger::secret::{SecretId, SecretValue, VersionId};
use claviger::server::{Limits, Listen};
use claviger::store::Put;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use crate::process::{Side, pin};
use crate::{VALUE, certificates};

/// Where the secrets are.
pub(crate) const ENVIRONMENT: &str = "production";
/// The secret that is read again and again.
pub(crate) const NAME: &str = "benchmark";
/// How many more there are, for a batch.
pub(crate) const BATCH: usize = 200;

/// One secret of the batch.
pub(crate) fn of_batch(number: usize) -> String {
    format!("{NAME}-{number:03}")
}

/// Serves until it is killed; says on its first line where, with which token to read, and where with TLS. What there
/// is none of is `-`.
pub(crate) fn serve(what: &str, folder: &Path) {
    pin(Side::Server);
    let runtime = runtime();
    match what {
        "echo" => runtime.block_on(serve_echo()),
        "durable" => runtime.block_on(serve_broker(what, Durability::Durable, folder)),
        "relaxed" => runtime.block_on(serve_broker(what, Durability::Relaxed, folder)),
        _ => panic!("--serve: `{what}` is none of echo, durable and relaxed"),
    }
}

/// The shape that serves the echo best: one thread that does everything.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Answers every read with the same bytes, and does nothing else.
struct Echo(v1::GetSecretResponse);

macro_rules! echo {
    ($($name:ident: $request:ident -> $response:ident),+ $(,)?) => {
        #[tonic::async_trait]
        impl SecretService for Echo {
            async fn get_secret(
                &self,
                _: Request<v1::GetSecretRequest>,
            ) -> Result<Response<v1::GetSecretResponse>, Status> {
                Ok(Response::new(self.0.clone()))
            }

            type WatchSecretsStream = tokio_stream::Empty<Result<v1::WatchSecretsResponse, Status>>;

            async fn watch_secrets(
                &self,
                _: Request<v1::WatchSecretsRequest>,
            ) -> Result<Response<Self::WatchSecretsStream>, Status> {
                Err(Status::unimplemented("the echo only reads"))
            }

            $(async fn $name(&self, _: Request<v1::$request>) -> Result<Response<v1::$response>, Status> {
                Err(Status::unimplemented("the echo only reads"))
            })+
        }
    };
}

echo! {
    batch_get_secrets: BatchGetSecretsRequest -> BatchGetSecretsResponse,
    list_secrets: ListSecretsRequest -> ListSecretsResponse,
    describe_secret: DescribeSecretRequest -> DescribeSecretResponse,
    put_secret: PutSecretRequest -> PutSecretResponse,
    move_label: MoveLabelRequest -> MoveLabelResponse,
    rollback_secret: RollbackSecretRequest -> RollbackSecretResponse,
    delete_secret: DeleteSecretRequest -> DeleteSecretResponse,
    restore_secret: RestoreSecretRequest -> RestoreSecretResponse,
    report_version_in_use: ReportVersionInUseRequest -> ReportVersionInUseResponse,
    list_consumers: ListConsumersRequest -> ListConsumersResponse,
}

async fn serve_echo() {
    let secret = v1::Secret {
        environment: ENVIRONMENT.to_owned(),
        name: NAME.to_owned(),
        version_id: "11111111-1111-4111-8111-111111111111".to_owned(),
        labels: vec!["AWSCURRENT".to_owned()],
        created_at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 123_456_789 }),
        payload: Some(v1::SecretPayload { data: vec![b'x'; VALUE].into(), content_type: 1 }),
        age: Some(prost_types::Duration { seconds: 3, nanos: 123_456_789 }),
        source: 2,
        ..Default::default()
    };
    let echo = SecretServiceServer::new(Echo(v1::GetSecretResponse { secret: Some(secret) }));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    ready(&format!("http://{} - -", listener.local_addr().unwrap()));
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    tonic::transport::Server::builder().add_service(echo).serve_with_incoming(incoming).await.unwrap();
}

async fn serve_broker(name: &str, durability: Durability, folder: &Path) {
    let mut environment = Environment::sealed(ENVIRONMENT.parse().unwrap());
    environment.durability = durability;
    let root_key = RootKeyChoice::File(folder.join(format!("{name}.key")));
    let registry = Registry::new([environment]).unwrap();
    let mut listen = vec![Listen::Tcp("127.0.0.1:0".parse().unwrap())];
    listen.extend(certificates::settings(folder).map(Listen::Tls));
    let resolved = Resolved {
        listen,
        // All connections come from one address here, and those of the row before may not have gone yet.
        limits: Limits { connections: 8_192, connections_per_caller: 4_096, ..Limits::default() },
        instance: "benchmark".to_owned(),
        ..Resolved::new(folder.join(name), root_key, PolicySource::shipped(), registry)
    };
    let running = Running::start(&resolved, &|_| None, SystemClock::shared()).await.unwrap();
    let token = prepare(&running).await;
    let mut doors = Vec::new();
    for listen in &resolved.listen {
        doors.push(listen.bind().await.unwrap());
    }
    let tls = doors.get(1).map_or("-", |door| door.address());
    ready(&format!("{} {token} {tls}", doors[0].address()));
    let (_stop, stopped) = watch::channel(false);
    running.serve(doors, resolved.limits, stopped).await.unwrap();
}

/// Puts the secrets and issues the token that the client reads them with.
async fn prepare(running: &Running) -> String {
    let administrator = || Call::internal(Principal::internal("benchmark", ["administrators"]), "benchmark");
    for name in (0..BATCH).map(of_batch).chain([NAME.to_owned()]) {
        let put = Put {
            value: SecretValue::text("x".repeat(VALUE)).unwrap(),
            token: VersionId::generate(),
            labels: Vec::new(),
            expected: None,
        };
        let id = SecretId::parse(ENVIRONMENT, &name).unwrap();
        running.broker.put(&administrator(), id, put, false).await.unwrap();
    }
    let request = TokenRequest {
        kind: PrincipalKind::User,
        principal: "reader".to_owned(),
        groups: BTreeSet::from(["operators".to_owned()]),
        claims: BTreeMap::new(),
        environments: BTreeSet::new(),
        source_addresses: Vec::new(),
        expires_in: Duration::from_secs(3_600),
        created_by: "benchmark".to_owned(),
    };
    let (_, secret) = running.broker.create_token(&administrator(), request).await.unwrap();
    secret.expose_text().unwrap().to_owned()
}

fn ready(line: &str) {
    println!("{line}");
    std::io::stdout().flush().unwrap();
}
