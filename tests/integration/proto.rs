//! The checked-in generated code is what the `.proto` files say.

use std::path::{Path, PathBuf};

use prost::Message as _;

const FILES: [&str; 7] = ["secret", "policy", "audit", "token", "key", "cache", "rotation"];

/// Generates the code and the descriptors from the `.proto` files, without `protoc`.
fn generate(out: &Path) -> (String, Vec<u8>) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let files: Vec<PathBuf> =
        FILES.iter().map(|name| root.join(format!("claviger/v1/{name}.proto"))).collect();
    let descriptors = protox::compile(files, [&root]).expect("the protos compile");
    let bytes = descriptors.encode_to_vec();
    tonic_prost_build::configure()
        .out_dir(out)
        .emit_rerun_if_changed(false)
        .bytes(".claviger.v1.SecretPayload.data")
        .skip_debug(claviger::proto::WITHOUT_DEBUG)
        .compile_fds(descriptors)
        .expect("code is generated");
    (std::fs::read_to_string(out.join("claviger.v1.rs")).expect("the generated file"), bytes)
}

#[test]
fn generated_code_is_up_to_date() {
    let folder = tempfile::tempdir().unwrap();
    let (code, descriptors) = generate(folder.path());
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/proto");
    if std::env::var_os("CLAVIGER_REGENERATE").is_some() {
        std::fs::write(kept.join("claviger.v1.rs"), &code).unwrap();
        std::fs::write(kept.join("claviger.v1.bin"), &descriptors).unwrap();
    }
    let hint = "run `CLAVIGER_REGENERATE=1 cargo test --test integration proto::` and commit the result";
    assert!(std::fs::read_to_string(kept.join("claviger.v1.rs")).unwrap() == code, "{hint}");
    assert!(std::fs::read(kept.join("claviger.v1.bin")).unwrap() == descriptors, "{hint}");
}

#[test]
fn messages_that_hold_a_value_print_none_of_it() {
    use claviger::proto::v1;
    let payload = v1::SecretPayload { data: bytes::Bytes::from_static(b"canary-71"), content_type: 1 };
    let answer = v1::GetSecretResponse {
        secret: Some(v1::Secret { payload: Some(payload.clone()), ..Default::default() }),
    };
    let put = v1::PutSecretRequest { payload: Some(payload), ..Default::default() };
    let token = v1::CreateTokenResponse { token: None, secret: "canary-71".to_owned() };
    for shown in [format!("{answer:?}"), format!("{put:?}"), format!("{token:?}")] {
        assert!(!shown.contains("canary"), "{shown}");
        // `canary-71` as a list of numbers, which is how bytes would print.
        assert!(!shown.contains("99, 97, 110"), "{shown}");
    }
}
