"""The planned step traced on FakeTensors of the real modules; imports torch."""
