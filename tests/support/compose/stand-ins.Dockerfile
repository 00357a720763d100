# What the images of docker-compose.yml are for it, from Debian's packages: users, folders, entry points. For the
# tests, where no registry can be reached.
ARG BASE
FROM ${BASE} AS python
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends python3 python3-venv \
    && ln -s python3 /usr/bin/python
CMD ["python3"]

FROM ${BASE} AS rabbitmq
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends rabbitmq-server \
    && rm -rf /var/lib/rabbitmq/.erlang.cookie /var/lib/rabbitmq/mnesia
ENV PATH=/usr/lib/rabbitmq/bin:$PATH HOME=/var/lib/rabbitmq LANG=C.UTF-8
VOLUME /var/lib/rabbitmq
CMD ["rabbitmq-server"]

FROM ${BASE} AS redis
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server \
    && install -d -o redis -g redis /data
WORKDIR /data
VOLUME /data
CMD ["redis-server"]

FROM ${BASE} AS prometheus
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus \
    && install -d -o nobody -g nogroup /prometheus
USER nobody
VOLUME /prometheus
ENTRYPOINT ["/usr/bin/prometheus"]
