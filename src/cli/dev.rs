//! `claviger dev`: a throw-away broker with sample secrets; with a command, the broker for that command alone.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;
use tokio::sync::watch;

use super::exit::{CliError, Exit};
use super::serve::{Hangup, start_logging, stop_on_signal, variables};
use super::{Context, exec};
use crate::client::{Address, Connection};
use crate::config::assembly::Running;
use crate::config::{Resolved, RootKeyChoice, samples};
use crate::error::Reason;
use crate::identity::PrincipalKind;
use crate::identity::peer_credentials::{Caller, Config};
use crate::inject::{self, Existing, Manifest, Options, SAMPLE_MANIFEST};
use crate::policy::PolicySource;
use crate::secret::EnvironmentName;
use crate::server::{Bound, Listen};

/// Runs a broker on an embedded store with sample secrets in development, staging and production, the shipped
/// policies, and you as an administrator.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Keep everything in this folder; without it, everything is gone at the end
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Listen on this Unix socket
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Listen on this loopback address too, for example 127.0.0.1:7340
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<std::net::SocketAddr>,
    /// Start although what is kept in DIR was brought back from the past, cut or removed; it is put on record
    #[arg(long, requires = "data")]
    accept_loss: bool,
    /// The manifest for CMD; without it, that of the sample application
    #[arg(short, long, value_name = "FILE", requires = "command")]
    manifest: Option<PathBuf>,
    /// Run this with the secrets of the environment (-e, else development) in its own, then end
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit, CliError> {
    let quiet = if args.command.is_empty() { None } else { Some("warn") };
    start_logging(context, quiet)?;
    let place = Place::of(&args)?;
    let resolved = resolved(&args, &place, context)?;
    // With a command, signals are the command's.
    let stopped = if args.command.is_empty() { Some(stop_on_signal(Hangup::Stops)?) } else { None };
    let running = Running::start(&resolved, &variables(context), Arc::clone(&context.clock)).await?;
    samples::seed(&running.broker).await?;
    samples::seed_rotations(&running.rotations, &running.broker).await?;
    let mut doors = vec![Listen::Unix { path: place.socket.clone(), mode: 0o600 }.bind().await?];
    if let Some(address) = args.listen {
        doors.push(Listen::Tcp(address).bind().await?);
    }
    if let Some(stopped) = stopped {
        // What is thrown away at the end needs no care.
        for warning in running.warnings.iter().filter(|_| place.temporary.is_none()) {
            tracing::warn!("{warning}");
        }
        announce(&place, &doors, context);
        running.serve(doors, resolved.limits, stopped).await?;
        return Ok(Exit::DONE);
    }
    let (stop, stopped) = watch::channel(false);
    let serving = tokio::spawn(running.serve(doors, resolved.limits, stopped));
    let ended = command(&args, &place, context).await;
    // The receiver is the broker; if it is gone it has ended already, and says how below.
    let _ = stop.send(true);
    let served = serving
        .await
        .map_err(|error| CliError::new(Reason::Internal, format!("the broker failed: {error}")))?;
    // What fails before the command runs must not be taken for the command's own end.
    let exit = ended.map_err(|error| if error.is_of_command() { error } else { error.before_command() })?;
    served?;
    Ok(exit)
}

/// Where the broker keeps its things.
struct Place {
    directory: PathBuf,
    socket: PathBuf,
    /// Removed, with all that is in it, when this goes.
    temporary: Option<TempDir>,
}

impl Place {
    fn of(args: &Args) -> Result<Self, CliError> {
        let failed =
            |error: std::io::Error| CliError::new(Reason::Internal, format!("a temporary folder: {error}"));
        let (directory, temporary) = match &args.data {
            Some(directory) => (directory.clone(), None),
            None => {
                let folder = tempfile::Builder::new().prefix("claviger-dev-").tempdir().map_err(failed)?;
                (folder.path().join("data"), Some(folder))
            }
        };
        let socket = args.socket.clone().unwrap_or_else(|| match &temporary {
            Some(folder) => folder.path().join("claviger.sock"),
            None => directory.join("claviger.sock"),
        });
        Ok(Self { directory, socket, temporary })
    }
}

fn resolved(args: &Args, place: &Place, context: &Context) -> Result<Resolved, CliError> {
    let uid = rustix::process::getuid().as_raw();
    let name = context.environ.text("USER")?.map_or_else(|| format!("uid:{uid}"), str::to_owned);
    let groups = ["administrators", "team"].map(str::to_owned).into();
    let you = Caller { uid, kind: PrincipalKind::User, id: name, groups };
    let unusable =
        |error: crate::environment::EnvironmentError| CliError::new(Reason::Internal, error.to_string());
    let root_key = RootKeyChoice::File(place.directory.join("keys/root.key"));
    let registry = samples::registry().map_err(unusable)?;
    Ok(Resolved {
        instance: "dev".to_owned(),
        peers: Config { callers: vec![you] },
        accept_loss: args.accept_loss,
        ..Resolved::new(place.directory.clone(), root_key, PolicySource::shipped(), registry)
    })
}

/// Says how to reach the broker.
fn announce(place: &Place, doors: &[Bound], context: &Context) {
    for door in doors {
        context.output.notice(&format!("listening on {}", door.address()));
    }
    let kept = match place.temporary {
        Some(_) => "everything is gone when it ends (Ctrl-C)".to_owned(),
        None => format!("everything is kept in {}", place.directory.display()),
    };
    context
        .output
        .notice(&format!("environments development, staging and production hold sample secrets; {kept}"));
    context.output.notice("to use it from another terminal:");
    context.output.notice(&format!(
        "  export CLAVIGER_ADDR=unix://{} CLAVIGER_ENV=development",
        absolute(&place.socket)
    ));
    context.output.notice("  claviger list; claviger get database#host; claviger exec -- env");
}

fn absolute(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string()
}

/// Asks the broker through its own door, as anyone would, and runs the command with what it says.
async fn command(args: &Args, place: &Place, context: &Context) -> Result<Exit, CliError> {
    let environment = match context.chosen_environment()? {
        Some(environment) => environment,
        // A throw-away broker is no place where the wrong environment could hurt.
        None => "development".parse::<EnvironmentName>()?,
    };
    let manifest = match &args.manifest {
        Some(path) => Manifest::load(path)?,
        None => Manifest::parse(SAMPLE_MANIFEST, "the sample manifest")?,
    };
    let connection =
        Connection::open(&Address::Unix(place.socket.clone()), None, context.global.timeout).await?;
    let variables = exec::variables(&connection, Some(&manifest), &environment, context).await?;
    drop(connection);
    let address = format!("unix://{}", absolute(&place.socket));
    let parent = context
        .environ
        .iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .filter(|(name, _)| name != "CLAVIGER_ADDR" && name != "CLAVIGER_ENV")
        .chain([
            (OsString::from("CLAVIGER_ADDR"), OsString::from(address)),
            (OsString::from("CLAVIGER_ENV"), OsString::from(environment.as_str())),
        ]);
    let options = Options { pristine: false, existing: Existing::SecretWins };
    let (child, notices) = inject::compose(parent, &variables, options)?;
    for notice in notices {
        context.output.notice(&notice.to_string());
    }
    exec::run_to_its_end(&args.command, child).await
}
