//! What several tests stand on: the real binary, the real servers beside it, and a bare gRPC connection.

pub mod assembled;
pub mod certificates;
pub mod moto;
pub mod postgresql;
pub mod program;

use std::path::Path;

use claviger::proto::v1::secret_service_client::SecretServiceClient;
use tonic::transport::{Channel, Endpoint};

/// A bare connection to a Unix socket, with no code of the product in it but the generated messages.
pub async fn channel(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
    });
    Endpoint::from_static("http://localhost")
        .connect_with_connector(connector)
        .await
        .expect("the socket answers")
}

/// The secrets service over it.
pub async fn secrets(socket: &Path) -> SecretServiceClient<Channel> {
    SecretServiceClient::new(channel(socket).await)
}
