//! A broker that rotates a database's password, and that may be killed, stopped and started again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use claviger::proto::v1;
use claviger::proto::v1::rotation_service_client::RotationServiceClient;
use claviger::proto::v1::secret_service_client::SecretServiceClient;
use rustix::process::Signal;
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic_types::StatusExt as _;

use super::database::{Login, Pair};
use super::{HUNG, PAUSE, until};
use crate::support::moto::REGION;
use crate::support::postgresql::Postgres;
use crate::support::program::{Program, Served};
use crate::support::{channel, secrets};

/// Of everything here.
pub(super) const ENVIRONMENT: &str = "rotated";
/// The secret that is rotated.
pub(super) const NAME: &str = "database";
const ADMIN: &str = "database-admin";
/// Short, because between two rotations lies at least this.
const TTL: Duration = Duration::from_millis(150);

/// How a stage is set.
pub(super) struct Plan {
    /// Where the values are: the endpoint of AWS; without one, in the broker's own database.
    pub(super) aws: Option<String>,
    /// Where the broker believes the database to be, if it is not where it is.
    pub(super) port: Option<u16>,
    /// How long a run belongs to a broker that was killed; half of it is how long one step may take.
    pub(super) lease: &'static str,
    /// When it rotates by itself.
    pub(super) schedule: &'static str,
    /// More keys of the definition.
    pub(super) more: &'static str,
    /// The ports of what must accept a new password, too.
    pub(super) endpoints: Vec<u16>,
    /// The broker's environment variables.
    pub(super) variables: Vec<(String, String)>,
    /// Below which folder everything is, if not below one of its own.
    pub(super) below: Option<PathBuf>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            aws: None,
            port: None,
            lease: "10s",
            schedule: "every 30d",
            more: "",
            endpoints: Vec::new(),
            variables: Vec::new(),
            below: None,
        }
    }
}

impl Plan {
    /// One whose broker is killed: whoever comes after need not wait long for the run.
    pub(super) fn to_be_killed() -> Self {
        Self { lease: "2s", ..Self::default() }
    }

    /// One whose values are in AWS.
    pub(super) fn in_aws(self, endpoint: &str) -> Self {
        Self { aws: Some(endpoint.to_owned()), ..self }
    }

    /// One whose broker reaches the database through a proxy.
    pub(super) fn through(self, port: u16) -> Self {
        Self { port: Some(port), ..self }
    }

    fn tables(&self) -> String {
        let (lease, ttl) = (self.lease, TTL.as_millis());
        let mut tables = format!(
            r#"
[rotation]
scheduler = true
concurrency = 8
retry_from = "100ms"
retry_to = "2s"
lease = "{lease}"
[environments.{ENVIRONMENT}]
ttl = "{ttl}ms"
"#
        );
        if let Some(endpoint) = &self.aws {
            // Of this stage alone, in a server that others use too.
            let unique = uuid::Uuid::new_v4();
            tables.push_str(&format!(
                r#"store = "aws"
[environments.{ENVIRONMENT}.aws]
region = "{REGION}"
endpoint = "{endpoint}"
name_template = "{unique}/{{environment}}/{{name}}"
"#
            ));
        }
        tables
    }

    fn definition(&self, pair: &Pair) -> String {
        let port = self.port.unwrap_or(pair.port);
        let Self { schedule, more, .. } = self;
        let endpoints: Vec<_> = self.endpoints.iter().map(|port| format!("\"127.0.0.1:{port}\"")).collect();
        let endpoints = endpoints.join(", ");
        let Pair { database, owner, users: [first, second], .. } = pair;
        format!(
            r#"
rotator = "postgresql-alternating"
schedule = "{schedule}"
grace = "0s"
{more}
[postgresql-alternating]
hosts = ["127.0.0.1:{port}"]
database = "{database}"
users = ["{first}", "{second}"]
owner = "{owner}"
admin = "{ADMIN}"
tls = "disable"
endpoints = [{endpoints}]
propagation = "2s"
"#
        )
    }
}

/// A broker with one rotation.
pub(super) struct Stage {
    /// What is rotated.
    pub(super) pair: Pair,
    /// Between two rotations lies at least this: for so long anyone may hold a value.
    pub(super) gap: Duration,
    plan: Plan,
    config: PathBuf,
    folder: PathBuf,
    program: Option<Program>,
    /// Removed at the end.
    _own: Option<tempfile::TempDir>,
}

impl Stage {
    /// Starts a broker, sets the rotation, and has it rotate once: from then on both users are there.
    pub(super) async fn raise(server: &Postgres, mut plan: Plan) -> Self {
        let own = plan.below.is_none().then(|| tempfile::tempdir().unwrap());
        let folder = own.as_ref().map_or_else(|| plan.below.clone().unwrap(), |own| own.path().to_owned());
        if plan.aws.is_some() {
            let credentials = [
                ("AWS_ACCESS_KEY_ID", "test"),
                ("AWS_SECRET_ACCESS_KEY", "test"),
                ("AWS_EC2_METADATA_DISABLED", "true"),
            ];
            plan.variables.extend(credentials.map(|(name, value)| (name.to_owned(), value.to_owned())));
        }
        let (config, _) = Served::configure(&folder, "", &plan.tables());
        let pair = Pair::make(server);
        let gap = TTL + TTL / 10;
        let mut stage = Self { pair, gap, plan, config, folder, program: None, _own: own };
        stage.start();
        stage.put(ADMIN, &stage.pair.admin.json());
        stage.put(NAME, &stage.pair.first.json());
        stage.set(stage.plan.definition(&stage.pair)).await;
        let first = stage.rotate().await;
        assert_eq!(first.result, "rotated", "{first:?}\n{}", stage.program().log());
        stage
    }

    /// Starts the broker (again), with the same configuration.
    pub(super) fn start(&mut self) {
        assert!(self.program.is_none(), "it runs");
        let variables: Vec<_> =
            self.plan.variables.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        self.program = Some(Program::serve(&self.config, &self.socket(), &variables));
    }

    /// SIGKILL.
    pub(super) fn kill(&mut self) {
        let mut program = self.program.take().expect("it runs");
        program.signal(Signal::KILL);
    }

    /// A signal that it lives through.
    pub(super) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.program().id(), signal).expect("it runs");
    }

    pub(super) fn program(&self) -> &Program {
        self.program.as_ref().expect("it runs")
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.folder.join("broker.sock")
    }

    pub(super) async fn rotations(&self) -> RotationServiceClient<Channel> {
        RotationServiceClient::new(channel(&self.socket()).await)
    }

    pub(super) async fn secrets(&self) -> SecretServiceClient<Channel> {
        secrets(&self.socket()).await
    }

    /// Writes a value as a person does.
    pub(super) fn put(&self, name: &str, value: &str) {
        let output = self.program().put(ENVIRONMENT, name, value.as_bytes());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Sets the rotation anew, with more keys in its definition.
    pub(super) async fn set_with(&self, more: &'static str) {
        let Plan { port, schedule, .. } = self.plan;
        let endpoints = self.plan.endpoints.clone();
        let plan = Plan { more, port, schedule, endpoints, ..Plan::default() };
        self.set(plan.definition(&self.pair)).await;
    }

    async fn set(&self, definition: String) {
        let request = v1::SetRotationRequest {
            environment: ENVIRONMENT.to_owned(),
            name: NAME.to_owned(),
            definition,
            ..Default::default()
        };
        self.rotations().await.set_rotation(request).await.expect("the definition fits");
    }

    /// How the rotation is.
    pub(super) async fn status(&self) -> v1::Rotation {
        let request = v1::GetRotationRequest {
            environment: ENVIRONMENT.to_owned(),
            name: NAME.to_owned(),
            ..Default::default()
        };
        let answer = self.rotations().await.get_rotation(request).await.unwrap();
        answer.into_inner().rotation.expect("it is set")
    }

    /// Waits until the run in progress has this in its way.
    pub(super) async fn meets(&self, trouble: &str) -> v1::RotationRun {
        until(trouble, async || {
            let run = self.status().await.run?;
            run.trouble.as_ref().is_some_and(|found| found.code == trouble).then_some(run)
        })
        .await
    }

    /// Has a run that failed taken up at once, as a person does who has mended something.
    pub(super) fn resume(&self) {
        self.program().ok(["rotation", "resume", "-e", ENVIRONMENT, NAME]);
    }

    /// Makes another version current again, as a person does.
    pub(super) async fn roll_back(&self, to: &str, from: &str) {
        let request = v1::RollbackSecretRequest {
            environment: ENVIRONMENT.to_owned(),
            name: NAME.to_owned(),
            to_version_id: to.to_owned(),
            expected_version_id: from.to_owned(),
            ..Default::default()
        };
        self.secrets().await.rollback_secret(request).await.unwrap();
    }

    /// Waits until nothing is going on any more; nobody does anything for it.
    pub(super) async fn settle(&self) -> v1::Rotation {
        until("the rotation comes to its end", async || {
            let rotation = self.status().await;
            (rotation.run.is_none() && rotation.health() == v1::RotationHealth::Idle).then_some(rotation)
        })
        .await
    }

    /// The time for which nothing may begin passes.
    pub(super) async fn old_enough(&self) {
        tokio::time::sleep(self.gap + PAUSE).await;
    }

    /// Asks for a rotation, and does not mind what becomes of it. Gives whether that was cut off after it had begun.
    pub(super) async fn ask(&self) -> JoinHandle<bool> {
        let mut client = self.rotations().await;
        tokio::spawn(async move {
            match client.rotate(rotate(false)).await {
                Ok(steps) => Steps(steps.into_inner()).drain().await,
                Err(_) => false,
            }
        })
    }

    /// Asks for a rotation, as a cron does, as soon as the last one is old enough. `wait`: until it is over, also
    /// through failures that may pass.
    pub(super) async fn begin(&self, wait: bool) -> Steps {
        let mut client = self.rotations().await;
        until("the last rotation is old enough", async || match client.rotate(rotate(wait)).await {
            Ok(steps) => Some(Steps(steps.into_inner())),
            Err(status) => {
                let reason = status.get_details_error_info().map(|info| info.reason);
                assert_eq!(reason.as_deref(), Some("ROTATION_TOO_SOON"), "{status:?}");
                None
            }
        })
        .await
    }

    /// Rotates, and gives how that came out.
    pub(super) async fn rotate(&self) -> v1::RotationStep {
        self.begin(true).await.end().await
    }

    /// Where the labels are.
    pub(super) async fn labels(&self) -> BTreeMap<String, String> {
        let request = v1::DescribeSecretRequest {
            environment: ENVIRONMENT.to_owned(),
            name: NAME.to_owned(),
            ..Default::default()
        };
        let described = self.secrets().await.describe_secret(request).await.unwrap().into_inner();
        let of = |version: v1::Version| {
            let id = version.version_id;
            version.labels.into_iter().map(move |label| (label, id.clone()))
        };
        described.versions.into_iter().flat_map(of).collect()
    }

    /// What a reader gets.
    pub(super) async fn current(&self) -> v1::Secret {
        self.get(None).await
    }

    /// Whether a reader gets anything.
    pub(super) async fn serves(&self) -> bool {
        let request = v1::GetSecretRequest {
            environment: ENVIRONMENT.to_owned(),
            name: NAME.to_owned(),
            ..Default::default()
        };
        self.secrets().await.get_secret(request).await.is_ok()
    }

    /// A version, whatever labels it has.
    pub(super) async fn version(&self, version: &str) -> v1::Secret {
        let selector = v1::selector::Selector::VersionId(version.to_owned());
        self.get(Some(v1::Selector { selector: Some(selector) })).await
    }

    async fn get(&self, selector: Option<v1::Selector>) -> v1::Secret {
        let request = v1::GetSecretRequest {
            environment: ENVIRONMENT.to_owned(),
            name: NAME.to_owned(),
            selector,
            ..Default::default()
        };
        let answer = self.secrets().await.get_secret(request).await.unwrap();
        answer.into_inner().secret.expect("a secret")
    }

    /// The run has come to its end with nothing lost: both users have passwords that the store knows, and AWSPENDING
    /// is on nothing that waits.
    pub(super) async fn assert_sound(&self) {
        let labels = self.labels().await;
        let pending = labels.get("AWSPENDING");
        assert!(pending.is_none_or(|pending| *pending == labels["AWSCURRENT"]), "{labels:?}");
        let mut users = BTreeSet::new();
        for label in ["AWSCURRENT", "AWSPREVIOUS"] {
            let login = login(&self.version(&labels[label]).await);
            let entered = self.pair.lets_in(&login);
            assert!(entered.is_ok(), "{label} of {labels:?}: {entered:?}\n{}", self.program().log());
            users.insert(login.username);
        }
        assert_eq!(users, BTreeSet::from(self.pair.users.clone()), "one each");
    }

    /// As [`settle`](Self::settle) and [`assert_sound`](Self::assert_sound), of a run with this token: it is the one
    /// that has become current, and it ended once.
    pub(super) async fn assert_resumed(&self, token: &str) {
        let rotation = self.settle().await;
        let ends: Vec<_> = rotation.history.iter().filter(|ended| ended.version_id == token).collect();
        assert_eq!(ends.len(), 1, "{rotation:?}");
        assert_eq!(ends[0].ending, "rotated", "{rotation:?}");
        assert_eq!(self.labels().await["AWSCURRENT"], token);
        self.assert_sound().await;
    }
}

fn rotate(wait: bool) -> v1::RotateRequest {
    let (environment, name) = (ENVIRONMENT.to_owned(), NAME.to_owned());
    v1::RotateRequest { environment, name, wait, ..Default::default() }
}

/// The name and the password in a value.
pub(super) fn login(secret: &v1::Secret) -> Login {
    let payload = secret.payload.as_ref().expect("a value");
    let value: serde_json::Value = serde_json::from_slice(&payload.data).expect("JSON");
    Login::new(value["username"].as_str().unwrap(), value["password"].as_str().unwrap())
}

/// What is told of a rotation while it goes on.
pub(super) struct Steps(tonic::Streaming<v1::RotateResponse>);

impl Steps {
    /// Reads until this phase begins; gives the token.
    pub(super) async fn reaches(&mut self, phase: &str) -> String {
        loop {
            let step = self.next().await.unwrap_or_else(|| panic!("it ended before `{phase}`"));
            assert!(step.result.is_empty(), "no `{phase}`, but {step:?}");
            if step.phase == phase {
                return step.version_id;
            }
        }
    }

    /// Reads to the end; gives the last word.
    pub(super) async fn end(mut self) -> v1::RotationStep {
        let mut last = None;
        while let Some(step) = self.next().await {
            last = Some(step);
        }
        last.expect("it says how it ended")
    }

    /// Reads until the broker is dead, or the run over. Gives whether a phase had begun, and nothing was said of its end.
    pub(super) async fn drain(mut self) -> bool {
        let mut within = false;
        while let Ok(Some(message)) = self.0.message().await {
            within = message.step.is_some_and(|step| !step.phase.is_empty() && step.result.is_empty());
        }
        within
    }

    async fn next(&mut self) -> Option<v1::RotationStep> {
        let message = tokio::time::timeout(HUNG, self.0.message()).await.expect("hung: a step");
        message.expect("the broker goes on").map(|message| message.step.expect("a step"))
    }
}
