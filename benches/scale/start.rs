//! The start of the program itself, on few secrets and policies and on many of either: what of it grows with which.

use std::path::Path;
use std::time::{Duration, Instant};

use claviger::client::{Address, Connection};
use claviger::proto::v1;

use crate::place::{ENVIRONMENT, Place, READERS, VALUE, id};
use crate::process::megabytes;
use crate::program::{CLAVIGER, Program, command};
use crate::{Column, Figure, SIZES, filled, heading, teams};

/// How many policies are many.
const POLICIES: usize = 10_000;
/// How often each is started; the median counts.
const RUNS: usize = 3;
/// How long the first answer may take.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) fn measure(folder: &Path, most: usize) -> Vec<Column> {
    let mut columns = Vec::new();
    for size in [SIZES[0], most] {
        let folder = folder.join(format!("start-{size}"));
        if !folder.exists() {
            filled(&folder, size);
        }
        let place = Place::at(&folder);
        place.configure();
        columns.push((format!("{} secrets, the shipped policies", heading(size)), started(&place)));
        place.set_policies(many());
        let (size, policies) = (heading(size), heading(POLICIES));
        columns.push((format!("{size} secrets, {policies} policies"), started(&place)));
    }
    columns
}

/// So many policies of teams, and among them the one that lets the first question be answered.
fn many() -> Vec<(String, String)> {
    let mut texts = teams::texts(POLICIES - 1);
    let readers = format!(
        "@id(\"benchmark-reads\")\npermit (\n  principal in Group::\"{READERS}\",\n  action == Action::\"read\",\n  \
         resource in Environment::\"{ENVIRONMENT}\"\n);\n"
    );
    texts.push(("benchmark.cedar".to_owned(), readers));
    texts
}

fn started(place: &Place) -> Vec<Figure> {
    eprintln!("starting the program {RUNS} times …");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (mut listening, mut answering, mut weights) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let mut serve = command(CLAVIGER);
        serve.args(["serve", "--config"]).arg(place.config());
        let begun = Instant::now();
        let program = Program::start(&mut serve);
        listening.push(begun.elapsed().as_secs_f64() * 1e3);
        runtime.block_on(first_answer(place));
        answering.push(begun.elapsed().as_secs_f64() * 1e3);
        weights.push(megabytes(program.settled_kib()));
        program.end();
    }
    vec![
        Figure::new("until it listens", median(listening), "ms"),
        Figure::new("until the first answer", median(answering), "ms"),
        Figure::new("memory then", median(weights), "MB"),
    ]
}

async fn first_answer(place: &Place) {
    let connection = Connection::open(&Address::Unix(place.socket()), None, PATIENCE).await;
    let connection = connection.unwrap_or_else(|error| panic!("{error}"));
    let name = id(0).name.to_string();
    let request =
        v1::GetSecretRequest { environment: ENVIRONMENT.to_owned(), name, ..v1::GetSecretRequest::default() };
    let answer = connection.secrets().get_secret(request).await.expect("an answer").into_inner();
    assert_eq!(answer.secret.unwrap().payload.unwrap().data.len(), VALUE);
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
